"""The same graph for ONNX Runtime on a CPU: attention with its cache inside, products in whole numbers, an 8-bit head."""
