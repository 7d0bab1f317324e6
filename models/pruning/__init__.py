"""Structured pruning, from how much to which units to what is left: `cut` is the way in.

`schedule`, `target_budget`, `uniform` and `latency` say how much; `scores`, `curvature` and `least_squares` judge units, `ranking` orders
them and `allocation` shares sizes out over the layers; `narrowing` and `depth` name what goes, and `repair` fits what stays.

Import from these files: `models/surgery.py` needs `slicing` alone, and the others need the surgery.
"""
