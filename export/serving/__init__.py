"""What servers read: `python -m export.serving` writes a model repository for Triton."""
