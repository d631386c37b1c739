"""What a person sees of a run: a line now and then, and on a terminal one that keeps moving."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from saeguard_sae.train.run.metrics import Figures, Moment

_REDRAW_S = 0.25


class Console:
    """Writes to a text stream, as a rule standard error."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._drawn = ""
        self._next = 0.0

    def note(self, text: str) -> None:
        """A line of its own."""
        self.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def report(self, moment: Moment) -> None:
        """Figures of every SAE: on the same line where there is one, else below."""
        ends = f"took {duration(moment.elapsed_s)}" if moment.step == moment.steps else f"ETA {duration(moment.left_s)}"
        head = f"step {moment.step:,}/{moment.steps:,}  {rate(moment.tokens_per_s)}  {ends}"
        if len(moment.saes) == 1:
            (only,) = moment.saes.values()
            self.note(f"{head}  {figures(only)}")
            return
        width = max(map(len, moment.saes))
        self.note("\n".join([head, *(f"  {name:<{width}}  {figures(one)}" for name, one in moment.saes.items())]))

    def live(self, step: int, steps: int, tokens_per_s: float, left_s: float) -> None:
        """Redraws the moving line, a few times a second at most; nothing where there is no terminal."""
        if not self._is_terminal or self._clock() < self._next:
            return
        self._next = self._clock() + _REDRAW_S
        done = round(24 * step / steps)
        bar = "#" * done + "." * (24 - done)
        self._draw(f"[{bar}] {step:,}/{steps:,}  {rate(tokens_per_s)}  ETA {duration(left_s)}")

    def _draw(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(len(self._drawn)))
        self._stream.flush()
        self._drawn = text

    def clear(self) -> None:
        """Takes the moving line away."""
        if self._drawn:
            self._stream.write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""


def figures(one: Figures) -> str:
    """One SAE's, for a line."""
    return f"loss {one.loss:.4f}  L0 {one.l0:6.1f}  FVU {one.fvu:.4f}  dead {one.dead_share:6.1%}"


def rate(tokens_per_s: float) -> str:
    """Three digits of it."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if tokens_per_s >= size:
            return f"{tokens_per_s / size:.3g}{unit} tokens/s"
    return f"{tokens_per_s:.3g} tokens/s"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
