"""What a request gets told: tokens with log-probabilities, readings, and the receipt, which is checked here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.loading import LoadedSae
from saeguard_sae.table import Counts
from saeguard_server.engine.protocol import ResolvedEdit, Steering
from saeguard_server.engine.transformers.sampler import Picked
from saeguard_server.engine.transformers.sequence import Sequence
from saeguard_server.errors import InternalFailure, NonFiniteOutput
from saeguard_server.reply import FeatureReading, InterventionReceipt, Receipt, Token, TokenLogprob


@dataclass(frozen=True, slots=True)
class HostPicked:
    """One step's choices on the host."""

    tokens: list[int]
    logprobs: list[float] | None
    top_values: list[list[float]] | None
    top_ids: list[list[int]] | None

    @classmethod
    def fetch(cls, picked: Picked) -> HostPicked:
        """The step's one wait for the device, and one more for each thing that somebody asked for."""
        top = picked.top
        return cls(
            picked.token.tolist(),
            None if picked.logprob is None else picked.logprob.tolist(),
            None if top is None else top[0].tolist(),
            None if top is None else top[1].tolist(),
        )

    def token(self, row: int, asked: int | None) -> Token:
        """The row's token with as many log-probabilities as its request asked for.

        Raises:
            NonFiniteOutput: its logits were not finite.
        """
        if self.tokens[row] < 0:
            raise NonFiniteOutput("the model's output is not finite for this request; an edit may be too large")
        if asked is None or self.logprobs is None:
            return Token(self.tokens[row])
        top: tuple[TokenLogprob, ...] = ()
        if asked and self.top_ids is not None and self.top_values is not None:
            pairs = zip(self.top_ids[row][:asked], self.top_values[row][:asked], strict=True)
            top = tuple(TokenLogprob(index, value) for index, value in pairs)
        return Token(self.tokens[row], self.logprobs[row], top)


def prompt_logprobs(logits: Tensor, following: list[int]) -> tuple[float, ...]:
    """logits [T, vocabulary] and the up to T tokens that followed -> their log-probabilities.

    Raises:
        NonFiniteOutput: the logits were not finite.
    """
    rows = logits[: len(following)].log_softmax(dim=-1)
    found = rows.gather(1, torch.tensor(following, device=logits.device)[:, None]).squeeze(1)
    if found.isnan().any():
        raise NonFiniteOutput("the model's output is not finite for this request; an edit may be too large")
    return tuple(found.tolist())


def readings(values: Tensor, start: int) -> tuple[FeatureReading, ...]:
    """values [T, watched] of the tokens from position ``start`` on."""
    return tuple(FeatureReading(start + row, tuple(one)) for row, one in enumerate(values.tolist()))


def receipt(
    sequence: Sequence,
    counts: list[Counts],
    saes: Mapping[str, LoadedSae],
    special_ids: frozenset[int],
    model_digest: str,
) -> Receipt | None:
    """The receipt of a request that had edits.

    Raises:
        InternalFailure: an edit was not offered every token in its scope exactly once.
    """
    steering = sequence.task.steering
    if not steering.edits:
        return None
    _check(sequence, steering, counts, special_ids)
    pairs = zip(steering.edits, counts, strict=True)
    return Receipt(
        model_digest=model_digest,
        steering_digest=steering.digest,
        interventions=tuple(_one(edit, count, saes[edit.sae]) for edit, count in pairs),
        forward_passes=sequence.forward_passes,
    )


def _check(sequence: Sequence, steering: Steering, counts: list[Counts], special_ids: frozenset[int]) -> None:
    read = sequence.tokens[: sequence.computed]
    special_at = [position for position, token in enumerate(read) if token in special_ids]
    for edit, count in zip(steering.edits, counts, strict=True):
        wanted = _in_scope(edit, len(read), special_at)
        if count.eligible != wanted:
            raise InternalFailure(
                f"{edit.kind} of feature {edit.feature} of {edit.sae!r} was applied to {count.eligible} tokens "
                f"instead of {wanted}"
            )


def _in_scope(edit: ResolvedEdit, length: int, special_at: list[int]) -> int:
    first, last = min(edit.first, length), min(edit.last, length)
    skipped = 0 if edit.special else bisect_left(special_at, last) - bisect_left(special_at, first)
    return last - first - skipped


def _one(edit: ResolvedEdit, count: Counts, sae: LoadedSae) -> InterventionReceipt:
    return InterventionReceipt(
        sae=edit.sae,
        feature=edit.feature,
        kind=edit.kind,
        sae_digest=sae.digest,
        site=str(sae.write_sites[0]),
        tokens_eligible=count.eligible,
        tokens_edited=count.edited,
        mean_activation=count.mean_activation,
        max_activation=count.max_activation,
        mean_relative_edit=count.mean_relative_edit,
        tokens_capped=count.capped,
    )
