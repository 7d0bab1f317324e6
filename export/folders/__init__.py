"""The student as a Hugging Face folder: in floating point, and in codes and scales."""
