"""Files for servers: `python -m export.serving` writes a model repository for Triton."""
