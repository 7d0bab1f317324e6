"""What several callbacks need to know of a run: its data, its order, its processes."""
