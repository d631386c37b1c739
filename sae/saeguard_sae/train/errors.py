"""What a person who trains an SAE did wrong, in one line."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 300


class TrainError(ValueError):
    """A user's mistake: one line that names the field and what is allowed."""


def one_line(err: BaseException) -> str:
    """What another library's error says, without its line breaks, cut where it goes on for too long."""
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check_choice(field: str, value: object, allowed: Iterable[str]) -> None:
    """Refuses a value that is none of these.

    Raises:
        TrainError: names the field and them.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise TrainError(f"{field}: must be one of {', '.join(allowed)}, got {value!r}")


def check_at_least(field: str, value: float, least: float) -> None:
    """Refuses a number below ``least``, and NaN.

    Raises:
        TrainError: names the field.
    """
    if not value >= least:
        raise TrainError(f"{field}: must be at least {least:g}, got {value:g}")
