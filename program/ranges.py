"""Ranges of settings: one check with one sentence, wherever a number comes from; not a number is in no range."""

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints


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


def check_no_nulls(settings: Any) -> None:
    """Raise `ValueError` for a field of a dataclass that is None where its type says otherwise, as YAML's null would make it."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        if getattr(settings, field.name) is None and NoneType not in get_args(hints[field.name]):
            raise ValueError(
                f"expected a value for {field.name}, found null; leave it out for its default, or give one"
            )
