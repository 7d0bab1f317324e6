"""Code that depends on the machine: training on a CPU, weights in few bits, shards, timing side by side."""
