"""From a reference, a folder or a checkpoint to a model; what comes with it is data, never code."""
