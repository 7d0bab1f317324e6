"""Structured pruning, from how much to which units to what is left: `cut` is the way in.

`budget` says how much and shares it out over the layers, `scores` judges units and orders them, `narrowing` and `depth` name what goes,
and `repair` fits what stays.
"""
