"""Export of a student: Hugging Face folder, ONNX, TensorRT engine, verification and benchmark."""

import quiet  # noqa: F401
