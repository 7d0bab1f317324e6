"""Behaviour of all commands: what they show, how they write results, which settings they take, what they download."""
