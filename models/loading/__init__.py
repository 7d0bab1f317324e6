"""Loads models from references, folders and checkpoints; files are data, never code."""
