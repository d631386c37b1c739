"""What every side does: prompts, how many tokens to add, which features to edit. Plain numbers, for any process.

Tokens are drawn anew for every side and round, so that no engine finds a prompt that it has read before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

MODEL, SAE, FACTS = "model", "mid", "facts.json"
"""What the folder of the benchmark holds."""
VOCAB = 32_000
D_SAE = 24_576
LAYER = 6
EDITS_EACH = 8
FIRST_WORD, SPECIAL = 256, 3
"""Ids below the first are single bytes, the last few are special; prompts are drawn from what lies between."""
BOS, EOS, PAD = VOCAB - 3, VOCAB - 2, VOCAB - 1
VALUES = {"zero": 0.0, "clamp": 1.0, "scale": 0.5, "add": 0.5}

Edit: TypeAlias = tuple[str, int, float]
"""Kind, feature, value."""
Steer: TypeAlias = Literal["none", "same", "own"]
"""Nobody is steered; everybody by the same edits; each by edits of its own."""


def batch(count: int, new: int, seed: int, steer: Steer = "none") -> dict[str, Any]:
    """Arguments of a side's "batch": ``count`` prompts of 16 to 48 tokens, and ``new`` tokens for each."""
    return {
        "prompts": [prompt(16 + (index * 13) % 33, f"{seed}.{index}") for index in range(count)],
        "new": new,
        "edits": [edits(index, steer) for index in range(count)],
    }


def prompt(length: int, seed: object) -> list[int]:
    """BOS and random words."""
    draw = random.Random(str(seed))
    return [BOS, *(draw.randrange(FIRST_WORD, VOCAB - SPECIAL) for _ in range(length - 1))]


def edits(index: int, steer: Steer) -> list[Edit]:
    """The edits of the request with this number."""
    if steer == "none":
        return []
    return different(index if steer == "own" else 0)


def different(index: int) -> list[Edit]:
    """Eight edits of features that no other request below 256 edits in this order."""
    kinds = list(VALUES.items())
    return [
        (kinds[j % len(kinds)][0], (index * 97 + j * 13) % D_SAE, kinds[j % len(kinds)][1]) for j in range(EDITS_EACH)
    ]


def tokens(prompts: Sequence[object], new: int) -> int:
    """Tokens generated."""
    return len(prompts) * new
