"""Ranking: how good, how many candidates a second, and the study of its teachers."""
