"""What the person at the keyboard got wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class UsageError(Exception):
    """Arguments that cannot be used together, or at all; ends with exit code 2."""


@contextmanager
def usage() -> Iterator[None]:
    """The client's ValueError, which names an argument, is a usage error here."""
    try:
        yield
    except ValueError as err:
        raise UsageError(str(err)) from err


def as_argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """For argparse, which would hide a ValueError's message."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return parsed
