"""Ranges that stand in types: what they say, and that nothing outside of them gets in."""

import math
import re
from dataclasses import dataclass
from typing import Annotated

import pytest

from program.ranges import Between, Count, Share, check_arguments, check_fields, check_range


@dataclass(frozen=True)
class Settings:
    share: Share = 0.5
    count: Count | None = None
    rate: Annotated[float, Between(0, excluded=(0,), advice="1 is usual")] = 1.0
    name: str = "plain"

    def __post_init__(self) -> None:
        check_fields(self, "settings.")


class Made:
    def __init__(self, count: Count = 0, name: str = "", *, share: Share | None = None) -> None:
        check_arguments(Made.__init__, locals(), "Made.")


@pytest.mark.parametrize("settings", [{}, {"share": 0}, {"share": 1}, {"count": 7}, {"rate": 1e-30}, {"count": None}])
def test_numbers_within_their_range(settings: dict) -> None:
    Settings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "expected settings.share between 0 and 1, found 1.5; change it"),
        ({"share": math.nan}, "expected settings.share between 0 and 1, found nan; change it"),
        ({"share": None}, "expected a value for settings.share, found null; leave it out for its default, or give one"),
        ({"count": -1}, "expected settings.count between 0 and 1,000,000,000, found -1; change it"),
        ({"rate": 0}, "expected settings.rate above 0, found 0; 1 is usual"),
        ({"rate": math.inf}, "expected settings.rate above 0, found inf; 1 is usual"),
        ({"name": None}, "expected a value for settings.name, found null; leave it out for its default, or give one"),
    ],
)
def test_numbers_out_of_their_range_and_nulls(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**settings)


def test_arguments_of_an_init() -> None:
    Made(3, share=None)
    with pytest.raises(ValueError, match="expected Made.count between 0 and 1,000,000,000, found -3"):
        Made(-3)
    with pytest.raises(ValueError, match="expected Made.share between 0 and 1, found 2"):
        Made(share=2)


@pytest.mark.parametrize(
    ("range", "text"),
    [
        (Between(0), "of 0 or more"),
        (Between(0, excluded=(0,)), "above 0"),
        (Between(0, 1, (1,)), "between 0 and 1 (1 excluded)"),
        (Between(0, 1, (0, 1)), "between 0 and 1 (both excluded)"),
        (Between(1e-6, 1024), "between 1e-06 and 1,024"),
    ],
)
def test_ranges_in_words(range: Between, text: str) -> None:
    assert repr(range) == text
    check_range("this", None, range)
    check_range("this", -math.inf, Between(-math.inf, math.inf))
    with pytest.raises(ValueError, match=f"^{re.escape(f'expected this {text}, found -1; change it')}$"):
        check_range("this", -1, range)
