"""A text coloured by one feature's value on each token; with brackets where there is no colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from saeguard_client.cli.terminal import Terminal, safe

# Backgrounds of the 256-colour palette from pale to strong, with a foreground that can be read on each.
SHADES: Final = ("30;48;5;230", "30;48;5;222", "30;48;5;214", "97;48;5;202", "97;48;5;160")


def shade(value: float, maximum: float) -> str:
    """SGR parameters for ``value``; "" where the feature is off."""
    if value <= 0 or maximum <= 0:
        return ""
    return SHADES[min(int(value / maximum * len(SHADES)), len(SHADES) - 1)]


def shaded(tokens: Sequence[str], values: Sequence[float], maximum: float, terminal: Terminal) -> str:
    """The tokens' text on one string; one value per token."""
    if terminal.has_color:
        pairs = zip(tokens, values, strict=True)
        return "".join(terminal.shaded(safe(text), shade(value, maximum)) for text, value in pairs)
    return "".join(_marked(safe(text), value) for text, value in zip(tokens, values, strict=True))


def _marked(text: str, value: float) -> str:
    """``[text|value]`` with leading space kept outside, so that words stay apart."""
    if value <= 0:
        return text
    word = text.lstrip(" ")
    return f"{text[: len(text) - len(word)]}[{word}|{value:.2g}]"
