"""Quantization against its peers, format by format."""
