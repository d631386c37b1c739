"""The text on which SAEs are checked where the settings name none."""

from __future__ import annotations

from importlib.resources import files


def calibration_text() -> str:
    """General English: stories, dialogue, letters, numbers, a little code. Passages are parted by empty lines."""
    return files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
