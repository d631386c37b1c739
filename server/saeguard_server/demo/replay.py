"""The demonstration over the wire: each scenario with and without its edits, side by side in the server's batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saeguard.types import KINDS
from saeguard_client import AsyncClient, Completion, Intervention, InterventionReceipt
from saeguard_server.demo.scenarios import Demonstration, Interval, Scenario, ScenarioEdit, bootstrap, interval

CONCURRENT = 64
"""Requests under way at once; twice the default number of slots."""


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """What one scenario did."""

    scenario: Scenario
    base: Interval
    steered: Interval
    samples: tuple[str, str]
    """A text without the edits, and the one of the same seed with them."""
    loss_change: dict[str, Interval]
    """Nats per token that the edits add to the loss of neutral texts, by kind."""
    tokens_edited: int

    @property
    def holds(self) -> bool:
        """Whether both rates are where the scenario says they must be."""
        return self.scenario.expectation.holds(self.base.mean, self.steered.mean)


class Replay:
    """Asks a server that serves the demo model."""

    def __init__(self, client: AsyncClient, demonstration: Demonstration) -> None:
        self._client, self._demonstration = client, demonstration
        self._concurrency = asyncio.Semaphore(CONCURRENT)
        self._neutral: dict[str, list[list[float]]] = {}
        self.tokens = 0
        """Tokens generated so far."""

    async def scenario(self, scenario: Scenario, generations: int, seed: int) -> ScenarioResult:
        """Runs one scenario: ``generations`` without its edits among as many with them, on the same seeds."""
        steer = [as_intervention(edit) for edit in scenario.interventions]
        seeds = range(seed, seed + generations)
        plain, steered, change = await asyncio.gather(
            asyncio.gather(*(self._generate(scenario, [], seed) for seed in seeds)),
            asyncio.gather(*(self._generate(scenario, steer, seed) for seed in seeds)),
            self._loss_change(steer),
        )
        return ScenarioResult(
            scenario=scenario,
            base=self._score(scenario, plain),
            steered=self._score(scenario, steered),
            samples=(plain[0].text, steered[0].text),
            loss_change=change,
            tokens_edited=sum(receipt.tokens_edited for completion in steered for receipt in _receipts(completion)),
        )

    async def untouched(self, scenario: Scenario, seeds: Sequence[int]) -> int:
        """How many unsteered generations are the same alone as beside steered ones, token for token."""
        steer = [as_intervention(edit) for edit in scenario.interventions]
        beside = asyncio.gather(*(self._generate(scenario, [], seed) for seed in seeds))
        company = asyncio.gather(*(self._generate(scenario, steer, seed) for seed in seeds))
        crowd, _ = await asyncio.gather(beside, company)
        same = 0
        for seed, completion in zip(seeds, crowd, strict=True):
            same += (await self._generate(scenario, [], seed)).tokens == completion.tokens
        return same

    async def _generate(self, scenario: Scenario, steer: list[Intervention], seed: int) -> Completion:
        async with self._concurrency:
            completion = await self._client.generate(
                scenario.prompt,
                steer=steer,
                max_new_tokens=scenario.max_new_tokens,
                temperature=scenario.temperature,
                seed=seed,
            )
        self.tokens += len(completion.tokens)
        return completion

    async def _loss_change(self, steer: list[Intervention]) -> dict[str, Interval]:
        """By kind of neutral text: the mean over texts of the loss with the edits less the loss without."""
        changes = {}
        for kind, texts in self._demonstration.neutral.items():
            if kind not in self._neutral:
                self._neutral[kind] = await self._losses(texts, [])
            with_edits = await self._losses(texts, steer)
            pairs = zip(self._neutral[kind], with_edits, strict=True)
            changes[kind] = bootstrap([_mean(after) - _mean(before) for before, after in pairs])
        return changes

    async def _losses(self, texts: Sequence[str], steer: list[Intervention]) -> list[list[float]]:
        async def losses(text: str) -> list[float]:
            async with self._concurrency:
                completion = await self._client.generate(text, steer=steer, max_new_tokens=1, prompt_logprobs=True)
            return [-logprob for logprob in completion.prompt_logprobs]

        return await asyncio.gather(*(losses(text) for text in texts))

    def _score(self, scenario: Scenario, completions: Sequence[Completion]) -> Interval:
        return interval([self._demonstration.score(scenario, completion.text) for completion in completions])


def as_intervention(edit: ScenarioEdit) -> Intervention:
    """A scenario's edit as the client sends it."""
    values: tuple[Any, ...] = () if edit.value is None else (edit.value,)
    unit: dict[str, Any] = {} if edit.unit == "raw" else {"unit": edit.unit}
    return KINDS[edit.kind](edit.sae, edit.feature, *values, **unit)


def _receipts(completion: Completion) -> Sequence[InterventionReceipt]:
    return completion.receipt.interventions if completion.receipt else ()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
