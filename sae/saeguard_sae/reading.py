"""How single features are read from a tensor: the weights that takes, and the arithmetic, for tables of any shape.

Features that one row does not tell (TopK and its kin, matching pursuit) also need their coder as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from saeguard_sae.activations import TanhReLU
from saeguard_sae.coder import SparseCoder
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.normalisation import NORMALISATIONS, frame
from saeguard_sae.pursuit import MatchingPursuit
from saeguard_sae.ranking import Rivals
from saeguard_sae.selections import GroupMax
from saeguard_sae.temporal import Temporal

Cells: TypeAlias = dict[str, Tensor]
"""What the columns of a table hold, by name."""

READ = (
    *("W_enc", "total", "normalisation", "restores", "gain", "bias", "gate", "threshold", "squashed"),
    *("whole", "feature"),
)
"""The columns by which features are read."""


class Coders:
    """The coders of which more than one row is needed, by a number from 1, and what their features compete with."""

    def __init__(self) -> None:
        self._whole: list[SparseCoder] = []
        self._rivals: dict[int, Rivals] = {}

    def number(self, coder: SparseCoder) -> int:
        """Its number; 0 for one whose features are told by their own rows."""
        if is_local(coder):
            return 0
        for number, known in enumerate(self._whole, start=1):
            if known is coder:
                return number
        self._whole.append(coder)
        return len(self._whole)

    def note(self, features: Iterable[tuple[int, Iterable[int]]]) -> None:
        """After features came or went: which of each numbered coder are in use."""
        chosen: dict[int, set[int]] = {}
        for number, found in features:
            chosen.setdefault(number, set()).update(found)
        self._rivals = {
            number: self._rivals[number] if number in self._rivals and not grouped else Rivals.of(coder, found)
            for number, found in chosen.items()
            if isinstance(coder := self._whole[number - 1], Dictionary)
            for grouped in [isinstance(coder.activation, GroupMax)]
        }

    def read(self, number: int, x: Tensor, index: Tensor, pre: Tensor) -> Tensor:
        """x [B, T, d] -> the features ``index`` [B, T, E] (-1 for none) of a coder, given their pre-activations."""
        if number not in self._rivals:
            return self._whole[number - 1].encode(x).float().gather(-1, index.clamp_min(0))
        flat = self._rivals[number].read(x.flatten(0, 1), index.flatten(0, 1), pre.flatten(0, 1))
        return flat.view_as(index)


@dataclass(frozen=True, slots=True)
class Needs:
    """What reading some features takes beside their rows."""

    kinds: frozenset[str] = frozenset({"none"})
    """Normalisations of their coders."""
    whole: frozenset[int] = frozenset()
    """Numbers of the coders of which more than one row is needed."""
    is_squashed: bool = False
    """Whether any feature goes through tanh."""

    @classmethod
    def of(cls, coders: Iterable[SparseCoder], numbers: Coders) -> Needs:
        """Those of features of these coders."""
        found = list(coders)
        kinds = {one.normalisation for one in found if not isinstance(one, Temporal)}
        squashed = any(isinstance(one, Dictionary) and isinstance(one.activation, TanhReLU) for one in found)
        return cls(frozenset(kinds), frozenset(map(numbers.number, found)) - {0}, squashed)

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.kinds | other.kinds, self.whole | other.whole, self.is_squashed or other.is_squashed)


def is_local(coder: SparseCoder) -> bool:
    """Whether each of its features is told by its own row."""
    return isinstance(coder, Dictionary) and coder.activation.local


def rows(coder: SparseCoder, features: Sequence[int], coders: Coders) -> Cells:
    """The columns ``READ`` of n features, [n] and [n, d_in], those that are not idle."""
    chosen = torch.tensor(features, device=coder.W_dec.device)
    found: Cells = {"feature": chosen, "whole": torch.full_like(chosen, coders.number(coder))}
    if isinstance(coder, Dictionary):
        found |= _encoder(coder, chosen)
    elif isinstance(coder, MatchingPursuit):
        found["restores"] = torch.full_like(chosen, NORMALISATIONS.index(coder.normalisation))
    return found


def _encoder(dictionary: Dictionary, features: Tensor) -> Cells:
    rows = dictionary.encoder_rows(features)
    kind = torch.full_like(features, NORMALISATIONS.index(dictionary.normalisation))
    return {
        "W_enc": rows.weights,
        "total": rows.weights.sum(dim=1),
        "normalisation": kind,
        "restores": torch.zeros_like(kind) if dictionary.is_transcoder else kind,
        "gain": rows.scalars.gain,
        "bias": rows.scalars.bias,
        "gate": rows.scalars.gate,
        "threshold": rows.scalars.threshold,
        "squashed": torch.full_like(features, rows.scalars.squashed, dtype=torch.bool),
    }


def frames(x: Tensor, kinds: frozenset[str]) -> Tensor | None:
    """[3, B, T, kinds] each token's shift, divisor and scale under every normalisation; None where none has any."""
    if not kinds - {"none"}:
        return None
    each = [frame(kind if kind in kinds else "none", x) for kind in NORMALISATIONS]
    return torch.stack([torch.cat(parts, dim=-1) for parts in zip(*each, strict=True)])


def pick(by_kind: Tensor, kind: Tensor) -> Tensor:
    """by_kind [B, T, kinds], kind int64 [B or 1, E] -> [B, T, E]."""
    return by_kind.gather(-1, kind[:, None].expand(*by_kind.shape[:2], -1))


def values(x: Tensor, q: Tensor, cells: Cells, framed: Tensor | None, needs: Needs, coders: Coders) -> Tensor:
    """The features [B, T, E] of x [B, T, d].

    Args:
        q: [B, T, E] the products of x with the features' rows.
        cells: the columns ``READ``, [B, E] or the same [1, E] for all.
        framed: ``frames`` of x under what ``needs`` names.
    """
    if framed is not None:
        kind = cells["normalisation"]
        q = (q - pick(framed[0], kind) * cells["total"][:, None]) / pick(framed[1], kind)
    pre = q * cells["gain"][:, None] + cells["bias"][:, None]
    f = pre.relu() * (q + cells["gate"][:, None] > cells["threshold"][:, None])
    if needs.is_squashed:
        f = torch.where(cells["squashed"][:, None], f.tanh(), f)
    for number in sorted(needs.whole):
        mine = (cells["whole"] == number)[:, None].expand_as(f)
        index = torch.where(mine, cells["feature"][:, None], -1)
        f = torch.where(mine, coders.read(number, x, index, torch.where(mine, pre, 0.0)), f)
    return f
