"""What plain transformers gives a request that it alone is asked, and what its receipt must count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saeguard.requests import GenerateRequest, TokenInput
from saeguard.types import Add, Cap, Clamp, Floor, Intervention, Scale, Scope, Zero
from support import reference
from support.engines import Answer, World
from support.models import BOS, EOS, PAD, SITES

SPECIAL = frozenset({BOS, EOS, PAD})
NEAR = 2e-4
"""Log-probabilities may differ by this."""


class Alone:
    """Greedy answers of a world's model, each made once.

    Args:
        least: tokens that are generated even where fewer are asked for, so that all who ask the same share them.
    """

    def __init__(self, world: World, least: int = 1) -> None:
        self._world, self._least = world, least
        self._made: dict[tuple[tuple[int, ...], tuple[Intervention, ...]], reference.Answer] = {}

    def answer(self, request: GenerateRequest) -> reference.Answer:
        """A request without a limit on its edits, for at least as many tokens as it asks for."""
        assert isinstance(request.input, TokenInput)
        assert request.max_relative_edit is None, "plain edits have no limit"
        new, key = max(request.sampling.max_new_tokens or 0, self._least), (request.input.ids, request.interventions)
        if key not in self._made or len(self._made[key].tokens) < new:
            ids = list(request.input.ids)
            edits = [self._plain(one, len(ids)) for one in request.interventions]
            self._made[key] = reference.generate(self._world.model, ids, new, edits, set())
        return self._made[key]

    def check(self, request: GenerateRequest, got: Answer) -> None:
        """Tokens, log-probabilities and receipt of a finished answer.

        Raises:
            AssertionError: one is not what the request gets alone.
        """
        wanted, count = self.answer(request), request.sampling.max_new_tokens
        assert got.ids == wanted.tokens[:count]
        assert got.completion is not None
        assert got.completion.usage.generated_tokens == count
        own = [float(row[token]) for row, token in zip(wanted.logprobs, got.ids, strict=False)]
        given = [token.logprob for token in got.tokens]
        torch.testing.assert_close(torch.tensor(given), torch.tensor(own), rtol=0, atol=NEAR)
        assert isinstance(request.input, TokenInput)
        read = [*request.input.ids, *got.ids[:-1]]
        receipt = got.completion.receipt
        counted = [one.tokens_eligible for one in receipt.interventions] if receipt else []
        assert counted == [eligible(one, read, len(request.input.ids)) for one in request.interventions]

    def under(self, rules: Sequence[Intervention], request: GenerateRequest) -> reference.Answer:
        """Its own edits made first at each site, then rules."""
        assert isinstance(request.input, TokenInput)
        ids, new = list(request.input.ids), request.sampling.max_new_tokens or 0
        own = [self._plain(one, len(ids)) for one in request.interventions]
        enforced = [replace(self._plain(one, len(ids)), stage=1) for one in rules]
        return reference.generate(self._world.model, ids, new, own + enforced, set())

    def _plain(self, one: Intervention, prompt_tokens: int) -> reference.PlainEdit:
        point = one.sae
        module, side = SITES[self._world.model_type][point]
        return reference.PlainEdit(
            self._world.saes[point], module, side, one.feature, change(one),
            lambda position, token: in_scope(one.scope, position, token, prompt_tokens),
        )  # fmt: skip


def in_scope(scope: Scope, position: int, token: int, prompt_tokens: int) -> bool:
    """Whether an edit with that scope applies to a token, by the words of its documentation."""
    ends_prompt = 0 < position == prompt_tokens - 1
    if token in SPECIAL and not scope.include_special_tokens and not ends_prompt:
        return False
    if scope.phase == "prompt" and position >= prompt_tokens:
        return False
    if scope.phase == "generated" and position < prompt_tokens - 1:
        return False
    return position >= scope.start and (scope.end is None or position < scope.end)


def eligible(one: Intervention, read: list[int], prompt_tokens: int) -> int:
    """Of the tokens that the model read, those that the edit applied to."""
    return sum(in_scope(one.scope, at, token, prompt_tokens) for at, token in enumerate(read))


def change(edit: Intervention) -> Callable[[Tensor], Tensor]:
    """What the edit makes of a feature's value."""
    match edit:
        case Zero():
            return torch.zeros_like
        case Clamp(value=value):
            return lambda f: torch.full_like(f, value)
        case Scale(factor=factor):
            return lambda f: f * factor
        case Add(value=value):
            return lambda f: f + value
        case Cap(value=value):
            return lambda f: f.clamp_max(value)
        case Floor(value=value):
            return lambda f: f.clamp_min(value)
