"""Running what was exported, token by token: one interface for torch, ONNX Runtime and engines."""
