"""Changing a student: edits as data, and what carries them out on layers, the hidden size and adapters."""
