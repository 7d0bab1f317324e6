"""Speed, memory, size and energy of exports side by side: `python -m export.benchmark`."""
