"""From logits to tokens for a whole batch: every request's settings are columns, randomness included.

A request's uniform numbers are drawn once from its own seed, so its tokens do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeguard_server.request import Sampling


@dataclass(frozen=True, slots=True)
class Picked:
    """One step's choice for B requests. ``token`` is -1 where the logits were not finite."""

    token: Tensor  # int64 [B]
    logprob: Tensor | None  # [B], when any request asked
    top: tuple[Tensor, Tensor] | None  # log-probabilities and ids [B, most asked for]


class Sampler:
    """Sampling settings of ``slots`` requests.

    Temperature, then top-k, then top-p, then min-p, as Hugging Face's processors do; the repetition penalty comes
    first (Keskar et al. 2019). The choice inverts the cumulative distribution in vocabulary order.
    """

    def __init__(self, slots: int, context: int, vocab_size: int, device: torch.device) -> None:
        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((slots,), value, dtype=dtype, device=device)

        self._columns = {
            "temperature": column(1.0),
            "top_p": column(1.0),
            "top_k": column(0, torch.int64),
            "min_p": column(0.0),
            "penalty": column(1.0),
            "is_greedy": column(False, torch.bool),
            "step": column(0, torch.int64),
        }
        self._noise = torch.zeros(slots, context, device=device)
        self._seen = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)
        self._asked: list[Sampling | None] = [None] * slots

    def write(self, slot: int, sampling: Sampling, seed: int, max_new_tokens: int, prompt: Sequence[int]) -> None:
        """Gives a slot a request's settings."""
        values = {
            "temperature": sampling.temperature or 1.0,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "penalty": sampling.repetition_penalty,
            "is_greedy": sampling.temperature == 0,
            "step": 0,
        }
        for name, value in values.items():
            self._columns[name][slot] = value
        if sampling.temperature > 0:
            # Not torch's generator: it keeps 32 bits of the seed.
            noise = np.random.Generator(np.random.Philox(seed)).random(max_new_tokens, dtype=np.float32)
            self._noise[slot, :max_new_tokens] = torch.from_numpy(noise)
        if sampling.repetition_penalty != 1:
            self._seen[slot] = False
            self._seen[slot, torch.tensor(prompt, device=self._seen.device)] = True
        self._asked[slot] = sampling

    def clear(self, slot: int) -> None:
        """Frees the slot; its columns are written anew before they are read again."""
        self._asked[slot] = None

    def move(self, source: int, target: int) -> None:
        """Moves a request's settings to a free slot."""
        for column in (*self._columns.values(), self._noise, self._seen):
            column[target] = column[source]
        self._asked[target], self._asked[source] = self._asked[source], None

    def pick(self, logits: Tensor, slots: slice) -> Picked:
        """logits [B, vocabulary] float32 of B consecutive slots -> one token each."""
        asked = [one for one in self._asked[slots] if one is not None]
        at = {name: column[slots] for name, column in self._columns.items()}
        scores = logits
        if any(one.repetition_penalty != 1 for one in asked):
            scores = self._penalise(scores, at["penalty"], slots)
        token = scores.argmax(dim=-1)
        if any(one.temperature > 0 for one in asked):
            noise = self._noise[slots].gather(1, at["step"][:, None])
            token = torch.where(at["is_greedy"], token, _draw(scores, at, noise, _filters(asked)))
        is_finite = logits.logsumexp(dim=-1).isfinite()
        if any(one.repetition_penalty != 1 for one in asked):
            self._seen[slots].scatter_(1, token[:, None], True)
        self._columns["step"][slots] += 1
        logprob, top = _logprobs(logits, token, asked)
        return Picked(torch.where(is_finite, token, -1), logprob, top)

    def _penalise(self, scores: Tensor, penalty: Tensor, slots: slice) -> Tensor:
        by = penalty[:, None]
        lowered = torch.where(scores < 0, scores * by, scores / by)
        return torch.where(self._seen[slots] & (by != 1), lowered, scores)


def _filters(asked: list[Sampling]) -> bool:
    return any(one.temperature > 0 and (one.top_k or one.top_p < 1 or one.min_p > 0) for one in asked)


def _draw(scores: Tensor, at: dict[str, Tensor], noise: Tensor, has_filters: bool) -> Tensor:
    """[B] tokens by inverting each row's cumulative distribution at its noise in [0, 1)."""
    scaled = scores / at["temperature"][:, None]
    if has_filters:
        scaled = scaled.masked_fill(scaled < _cutoff(scaled, at), -torch.inf)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    # Just below the total, or rounding could land behind the last token that may be chosen.
    wanted = noise * (1 - 1e-6) * cumulative[:, -1:]
    last = scores.shape[-1] - 1
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_max(last)


def _cutoff(scaled: Tensor, at: dict[str, Tensor]) -> Tensor:
    """[B, 1] the smallest score that top-k, top-p and min-p all keep."""
    ordered = scaled.sort(dim=-1, descending=True).values
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    top_k = at["top_k"][:, None]
    keep = (rank < top_k) | (top_k == 0)
    probability = ordered.masked_fill(~keep, -torch.inf).softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    top_p = at["top_p"][:, None]
    keep &= (before < top_p) | (top_p >= 1)
    keep &= probability >= at["min_p"][:, None] * probability[:, :1]
    keep[:, 0] = True
    return ordered.masked_fill(~keep, torch.inf).amin(dim=-1, keepdim=True)


def _logprobs(
    logits: Tensor, token: Tensor, asked: list[Sampling]
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    wanted = [one.logprobs for one in asked if one.logprobs is not None]
    if not wanted:
        return None, None
    own = logits.log_softmax(dim=-1)
    chosen = own.gather(1, token[:, None]).squeeze(1)
    most = min(max(wanted), logits.shape[-1])
    if not most:
        return chosen, None
    values, index = own.topk(most, dim=-1)
    return chosen, (values, index)
