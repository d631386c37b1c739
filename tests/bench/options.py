"""What can be asked of the benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """As given on the command line.

    Attributes:
        new: tokens that every request generates.
    """

    only: tuple[str, ...]
    dtype: str
    rounds: int
    new: int
    requests: int


def parse(given: Sequence[str] | None, topics: Sequence[str], description: str | None) -> Options:
    """From the command line; ends the program with a message where something is not one of what is allowed."""
    parser = argparse.ArgumentParser(
        prog="bench", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(topics), help=f"some of {', '.join(topics)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--requests", type=int, default=32)
    args = parser.parse_args(given)
    only = tuple(args.only.split(","))
    for name in only:
        if name not in topics:
            parser.error(f"--only: {name!r} is not one of {', '.join(topics)}")
    if args.rounds < 1 or args.new < 2 or not 1 <= args.requests <= 32:
        parser.error("--rounds must be 1 or more, --new 2 or more, --requests 1 to 32")
    return Options(only, args.dtype, args.rounds, args.new, args.requests)
