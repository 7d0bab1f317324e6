"""Side-by-side measurements; one command each, see `benchmarks/harness.py` for what they have in common."""

import program.screen  # noqa: F401
