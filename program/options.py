"""Options of the commands that read no recipes: a mistake in one line, and numbers with their range."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from program.ranges import Between


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, not below fifty lines of usage."""

    def error(self, message: str) -> NoReturn:
        """Say it and exit with 2."""
        self.exit(2, f"error: {' '.join(message.split())} (all options: {self.prog} --help)\n")


def up_to(most: int, *, least: int = 1) -> Callable[[str], int]:
    """The type of an option: a whole number of `least` or more, and at most so many."""
    whole = Between(least, most)

    def number(text: str) -> int:
        found = int(text)
        if found not in whole:
            raise argparse.ArgumentTypeError(f"expected a number {whole}, found {text}")
        return found

    number.__name__ = "whole number"
    return number


positive = up_to(1_000_000)
