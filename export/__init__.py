"""Export of a student: Hugging Face folder, ONNX, TensorRT engine, verification and benchmark."""

import program.screen  # noqa: F401
