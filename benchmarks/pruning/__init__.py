"""Structured pruning against its peers: how good, how fast, and what training recovers."""
