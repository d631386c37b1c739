"""What can be asked of the training benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from bench.train.roster import LIBRARIES


@dataclass(frozen=True)
class Size:
    """An SAE's size, and how much of it is trained.

    Attributes:
        pool: batches, over and over.
        rounds: in which every side trains in turn, after one step that warms up.
        each: steps of a round.
    """

    d_in: int
    d_sae: int
    pool: int
    rounds: int
    each: int

    def __str__(self) -> str:
        return f"{self.d_in}x{self.d_sae}"

    @property
    def steps(self) -> int:
        """Of every side."""
        return 1 + self.rounds * self.each


SIZES = (Size(256, 4096, 16, 4, 10), Size(768, 24576, 4, 2, 1))


@dataclass(frozen=True)
class Options:
    """As given on the command line."""

    sizes: tuple[Size, ...]
    threads: tuple[int, ...]
    only: tuple[str, ...]


def parse(given: Sequence[str] | None, description: str | None) -> Options:
    """From the command line; ends the program with a message where something is not one of what is allowed."""
    parser = argparse.ArgumentParser(
        prog="bench.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {str(size): size for size in SIZES}
    parser.add_argument("--sizes", default=",".join(sizes), help=f"some of {', '.join(sizes)}")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, such as 1,2")
    parser.add_argument("--steps", type=int, default=0, help="steps of a round, in place of each size's own")
    parser.add_argument("--rounds", type=int, default=0, help="rounds, in place of each size's own")
    parser.add_argument("--only", default=",".join(LIBRARIES), help="libraries beside ours, some of the default")
    args = parser.parse_args(given)
    for name, value, allowed in (("--sizes", args.sizes, sizes), ("--only", args.only, LIBRARIES)):
        for one in filter(None, value.split(",")):
            if one not in allowed:
                parser.error(f"{name}: {one!r} is not one of {', '.join(allowed)}")
    if args.steps < 0 or args.rounds < 0 or not all(one in ("1", "2", "4", "8") for one in args.threads.split(",")):
        parser.error("--steps and --rounds must be 0 or more, --threads some of 1, 2, 4, 8")
    chosen = (sizes[one] for one in args.sizes.split(","))
    return Options(
        tuple(Size(one.d_in, one.d_sae, one.pool, args.rounds or one.rounds, args.steps or one.each) for one in chosen),
        tuple(int(one) for one in args.threads.split(",")),
        tuple(filter(None, args.only.split(","))),
    )
