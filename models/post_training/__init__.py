"""Quantization after training, layer by layer."""
