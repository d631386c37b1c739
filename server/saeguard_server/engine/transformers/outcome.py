"""From a step's tensors to what a request is told: tokens with log-probabilities, and readings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_server.engine.transformers.sampler import Picked
from saeguard_server.errors import NonFiniteOutput
from saeguard_server.reply import FeatureReading, Token, TokenLogprob


@dataclass(frozen=True, slots=True)
class HostPicked:
    """One step's choices on the host, and which of the requests that a trigger can stop it did."""

    stopped: list[int]
    tokens: list[int]
    logprobs: list[float] | None
    top_values: list[list[float]] | None
    top_ids: list[list[int]] | None

    @classmethod
    def fetch(cls, picked: Picked | None, stopped: Tensor | None) -> HostPicked:
        """The step's one wait for the device, and one more for each thing that somebody asked for.

        Args:
            stopped: bool [n].
        """
        flags = [] if stopped is None else [stopped.long()]
        if picked is None:
            return cls(torch.cat(flags).tolist() if flags else [], [], None, None, None)
        whole = torch.cat([picked.token, *flags]).tolist() if flags else picked.token.tolist()
        tokens, top = len(picked.token), picked.top
        return cls(
            whole[tokens:],
            whole[:tokens],
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
