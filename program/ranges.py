"""Ranges of settings stand in their types and are checked at one place; NaN is in no range.

    share: Annotated[float, Between(0, 1)] = 1.0

A dataclass of settings calls `check_fields`, a class whose settings are arguments calls `check_arguments`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Between:
    """The numbers that a setting may be.

    Both ends belong to it, except those that are excluded.
    """

    low: float
    high: float = LARGEST  # any number but infinity
    excluded: tuple[float, ...] = ()
    advice: str = "change it"  # how to mend it

    def __contains__(self, value: float) -> bool:
        """Whether a setting may be this number."""
        return self.low <= value <= self.high and value not in self.excluded

    def __repr__(self) -> str:
        """As errors and `--help` say it."""
        if self.high == LARGEST:
            return f"above {self.low:g}" if self.low in self.excluded else f"of {self.low:g} or more"
        ends = "both" if len(self.excluded) == 2 else "".join(f"{end:g}" for end in self.excluded)
        return f"between {self.low:,.10g} and {self.high:,.10g}{ends and f' ({ends} excluded)'}"


Count = Annotated[int, Between(0, 1e9)]
Positive = Annotated[int, Between(1, 1e9)]
Share = Annotated[float, Between(0, 1)]


def check_fields(settings: Any, owner: str = "") -> None:
    """Raise `ValueError` for a field out of its range, or null against its type; `owner` is a prefix of its name."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        if getattr(settings, field.name) is None and NoneType not in get_args(hints[field.name]):
            raise ValueError(
                f"expected a value for {owner}{field.name}, found null; leave it out for its default, or give one"
            )
    _check(hints, vars(settings), owner)


def check_arguments(init: Callable[..., Any], values: Mapping[str, Any], owner: str) -> None:
    """Raise `ValueError` for an argument of an `__init__` that is out of its range; `values` are its `locals()`."""
    _check(get_type_hints(init, include_extras=True), values, owner)


def check_range(name: str, value: float | None, range: Between) -> None:
    """Raise `ValueError` for a number out of its range; None is no number and passes."""
    if value is not None and value not in range:
        raise ValueError(f"expected {name} {range}, found {value:,.10g}; {range.advice}")


def _check(hints: Mapping[str, Any], values: Mapping[str, Any], owner: str) -> None:
    for name, hint in hints.items():
        for range in _ranges(hint):
            check_range(f"{owner}{name}", values[name], range)


def _ranges(hint: Any) -> Iterator[Between]:
    """Those of a type: its own, or of a part of a union with None."""
    yield from (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Between))
    if NoneType in get_args(hint):
        for part in get_args(hint):
            yield from _ranges(part)
