"""What pruning and quantization both learn from calibration batches."""
