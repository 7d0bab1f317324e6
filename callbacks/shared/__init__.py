"""Shared by several callbacks: the run's data, the callbacks' order, its processes."""
