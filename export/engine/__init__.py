"""TensorRT engines: compiled from the graph, and read again to see which products are quantized."""
