"""Where the command line writes: safe text, colour only where it is wanted, cells counted as terminals do."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from typing import Final, TextIO

from saeguard_client.cli import settings

_RESET: Final = "\x1b[0m"
# Marks that reorder what is already on the screen are category Cf, like harmless joiners, so they are named.
_BIDI: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def safe(text: str, keep: str = "\n\t") -> str:
    """``text`` with every control character but ``keep`` spelled out: a model must not be able to drive a terminal."""
    return "".join(char if char in keep or not _is_control(char) else _spelled(char) for char in text)


def cells(text: str) -> int:
    """Columns that safe ``text`` takes on a terminal."""
    return sum(_width(char) for char in text)


class Terminal:
    """Standard output and error of this process."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self.is_tty = self._out.isatty()
        self._is_mid_line = False
        self.has_color = self.is_tty and not settings.color_is_refused()

    @property
    def width(self) -> int:
        """Columns; 80 where nobody knows."""
        return shutil.get_terminal_size().columns

    def write(self, text: str) -> None:
        """To standard output at once, without a newline."""
        if text:
            # Before writing: an interrupt may come as soon as somebody has read this.
            self._is_mid_line = not text.endswith("\n")
        self._out.write(text)
        self._out.flush()

    def end_line(self) -> None:
        """Completes the line that ``write`` began, if there is one."""
        if self._is_mid_line:
            self.write("\n")

    def line(self, text: str = "") -> None:
        """To standard output."""
        self._out.write(f"{text}\n")

    def note(self, text: str) -> None:
        """To standard error, after what standard output still holds."""
        self._out.flush()
        self._err.write(f"{text}\n")

    def shaded(self, text: str, sgr: str) -> str:
        """``text`` under the SGR parameters ``sgr``, line by line so that no colour runs to a line's end."""
        if not self.has_color or not sgr:
            return text
        return "\n".join(f"\x1b[{sgr}m{line}{_RESET}" if line else "" for line in text.split("\n"))


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _BIDI


def _spelled(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
