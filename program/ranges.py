"""Ranges of settings: one check with one sentence, wherever a number comes from; not a number is in no range."""

from collections.abc import Mapping


def check_ranges(owner: str, values: Mapping[str, float | None], **ranges: tuple[float, float]) -> None:
    """Raise `ValueError` for a number out of its range.

    Args:
        owner: What the settings are of, as a prefix of their names.
        values: By name; None is no number and passes.
        ranges: Smallest and largest number accepted.
    """
    for name, (low, high) in ranges.items():
        value = values[name]
        if value is not None and not low <= value <= high:
            raise ValueError(f"expected {owner}{name} between {low:g} and {high:g}, found {value:g}; change it")
