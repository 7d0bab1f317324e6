"""A student as an ONNX graph: traced by kinds of layers, repeated to its depth, and bound to weights that stay outside."""
