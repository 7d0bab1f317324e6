"""Gradual pruning during `fit`: when its events take place, what each costs, and what it does."""
