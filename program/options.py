"""Options of the commands that read no recipes: a mistake in one line, and numbers with their range."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, not below fifty lines of usage."""

    def error(self, message: str) -> NoReturn:
        """Say it and exit with 2."""
        self.exit(2, f"error: {' '.join(message.split())} (all options: {self.prog} --help)\n")


def positive(text: str) -> int:
    """An option's whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, found {text}")
    return number
