"""Export of a student: Hugging Face folder, ONNX, TensorRT engine, verification and benchmark."""
