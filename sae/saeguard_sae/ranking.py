"""Which features of a competing activation are let through, without encoding more than that takes. All of it exact.

A feature of TopK is on when fewer than k rivals score above it. Three shortcuts: a value of 0 needs no rank (a negative
pre-activation under ReLU); the dictionary is encoded in blocks and a token is done when k rivals are above each of its
features; GroupMax compares within its group alone. Ties at the k-th place count as let through, where ``torch.topk``
takes one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.normalisation import normalise
from saeguard_sae.selections import GroupMax, Selection, is_selection

FIRST, BLOCK = 512, 4096
"""Features encoded between two looks at which tokens are done: few at first, which most tokens need no more than, then
twice as many each time up to so many."""


@dataclass(frozen=True, slots=True, eq=False)
class Rivals:
    """Those that the features of a dictionary compete with: all of it, or only the groups of ``features``."""

    dictionary: Dictionary
    selection: Selection
    W_enc: Tensor
    """[d_in, n]"""
    bias: Tensor
    """[n] with the centring folded in."""
    first: Tensor
    """int64 [groups]: where a group's rows begin; -1 for groups that are not there."""

    @classmethod
    def of(cls, dictionary: Dictionary, features: Iterable[int]) -> Rivals:
        """The rivals of these features. Groups' rows are copied; everything else is a view."""
        selection = dictionary.activation
        assert is_selection(selection), "only competing features have rivals"
        first = torch.full((selection.groups,), -1, dtype=torch.int64, device=dictionary.W_enc.device)
        if not isinstance(selection, GroupMax):
            first[:] = 0
            return cls(dictionary, selection, dictionary.W_enc, dictionary.centred_bias(), first)
        size = dictionary.d_sae // selection.groups
        groups = torch.tensor(sorted({one // size for one in features}), device=first.device)
        first[groups] = torch.arange(len(groups), device=first.device) * size
        rows = (groups[:, None] * size + torch.arange(size, device=first.device)).flatten()
        W_enc, bias = dictionary.W_enc.T[rows].T.float(), dictionary.b_enc[rows].float()
        bias = bias - dictionary.b_dec.float() @ W_enc if dictionary.centre else bias
        return cls(dictionary, selection, W_enc, bias, first)

    def read(self, x: Tensor, features: Tensor, pre: Tensor) -> Tensor:
        """The values of features [N, E] of tokens x [N, d_in] in float32, given their pre-activations ``pre`` [N, E].

        A cell that is not of this dictionary has feature -1 and ``pre`` 0; its value is 0.
        """
        worth = self.selection.value(pre)
        undecided = worth != 0
        # Gathering only the tokens that need it would make a GPU wait for the host.
        if x.device.type == "cpu":
            rows = undecided.any(dim=-1).nonzero().squeeze(1)
            if not len(rows):
                return torch.zeros_like(worth)
            on = torch.zeros_like(undecided)
            on[rows] = self._on(x[rows], features[rows], pre[rows], undecided[rows])
        else:
            on = self._on(x, features, pre, undecided)
        gain = self.selection.parameters().get("gain")
        return torch.where(on, worth if gain is None else worth * gain[features], 0.0)

    def _on(self, x: Tensor, features: Tensor, pre: Tensor, undecided: Tensor) -> Tensor:
        n = normalise(self.dictionary.normalisation, x)
        score = self.selection.score(pre)
        if isinstance(self.selection, GroupMax):
            return undecided & self._leads(n, features, score)
        return undecided & self._ranks(n, features, score, undecided)

    def _leads(self, n: Tensor, features: Tensor, score: Tensor) -> Tensor:
        """Whether each feature is the largest of its group."""
        size = self.dictionary.d_sae // self.selection.groups
        every = self.selection.score(n @ self.W_enc.float() + self.bias)
        at = self.first[features // size] + features % size
        every = _with_own(every, torch.where(features < 0, -1, at), score, slice(0, every.shape[1]))
        best = every.view(len(every), -1, size).amax(dim=-1)
        return score >= best.gather(1, torch.where(features < 0, 0, at // size))

    def _ranks(self, n: Tensor, features: Tensor, score: Tensor, undecided: Tensor) -> Tensor:
        """Whether each feature is among the ``limit`` largest: its token's k-th score so far is never above it."""
        alive = undecided.clone()
        best = score.new_full((len(n), self.selection.limit), -torch.inf)
        rows = torch.arange(len(n), device=n.device)
        for part in self._blocks():
            every = self.selection.score(n[rows] @ self.W_enc[:, part].float() + self.bias[part])
            every = _with_own(every, features[rows], score[rows], part)
            best[rows] = torch.cat([best[rows], every], dim=1).topk(self.selection.limit, dim=1).values
            alive[rows] &= score[rows] >= best[rows, -1:]
            if n.device.type == "cpu":
                rows = alive.any(dim=-1).nonzero().squeeze(1)
                if not len(rows):
                    break
        return alive

    def _blocks(self) -> Iterator[slice]:
        start, size, end = 0, min(FIRST, BLOCK), self.W_enc.shape[1]
        while start < end:
            yield slice(start, min(start + size, end))
            start, size = start + size, min(2 * size, BLOCK)


def _with_own(every: Tensor, features: Tensor, score: Tensor, part: slice) -> Tensor:
    """The block's scores with those that were computed alone in their place: one product rounds unlike many, and a
    feature must not lose to itself."""
    inside = (features >= part.start) & (features < part.stop)
    # A spare column takes the cells outside the block.
    at = torch.where(inside, features - part.start, every.shape[1])
    return torch.cat([every, every[:, :1]], dim=1).scatter(1, at, score)[:, :-1]
