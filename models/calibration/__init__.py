"""Statistics of calibration batches, for pruning and quantization."""
