"""GetActivations: which features fire on which token of each input, under edits if there are any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from saeguard.requests import ActivationRequest, FeatureSelection, ModelInput, Selection, TopKSelection
from saeguard.results import ActivationPart
from saeguard.types import FeatureRef
from saeguard_server.admission import Admission
from saeguard_server.caller import Call
from saeguard_server.catalog import find_feature, find_sae
from saeguard_server.engine.protocol import Engine, InspectTask
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.errors import InvalidRequest
from saeguard_server.generation import check_length, encode_prompt
from saeguard_server.settings import LimitSettings
from saeguard_server.steering import TokenRange, resolve_steering


class ReadActivations:
    """Reads inputs without generating."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: LimitSettings, gate: Admission) -> None:
        self._engine, self._tokenizer, self._limits, self._gate = engine, tokenizer, limits, gate

    async def stream(self, request: ActivationRequest, call: Call) -> AsyncGenerator[ActivationPart]:
        """Parts of whole tokens, input by input; everything is checked before the first is read.

        Raises:
            UnknownName, InvalidRequest: what cannot be served as asked, by field, before any work.
            PermissionDenied, QuotaExceeded: what this caller may not, before any work.
            DeadlineExceeded, NonFiniteOutput, Unavailable, InternalFailure: from the engine.
        """
        with self._gate.request(call.caller, request) as spending:
            tasks = await asyncio.to_thread(self._prepare, request, call)
            spending.take(sum(len(task.tokens) for task in tasks))
            for task in tasks:
                tokens = len(task.tokens)
                async with self._gate.turn(call.caller, tokens), aclosing(self._engine.inspect(task)) as parts:
                    spending.use(tokens)
                    async for part in parts:
                        yield part

    def _prepare(self, request: ActivationRequest, call: Call) -> list[InspectTask]:
        selections = self._selections(request)
        return [self._task(request, call, selections, index, one) for index, one in enumerate(request.inputs)]

    def _task(
        self,
        request: ActivationRequest,
        call: Call,
        selections: tuple[tuple[str, Selection], ...],
        index: int,
        prompt: ModelInput,
    ) -> InspectTask:
        prefix = f"inputs[{index}]."
        encoded = encode_prompt(self._tokenizer, prompt, prefix)
        check_length(prompt, len(encoded.ids), self._engine.model.max_context, prefix)
        reach = TokenRange(encoded.ids, len(encoded.ids), self._tokenizer.special_ids)
        steering = resolve_steering(self._engine, request.interventions, None, reach)
        return InspectTask(
            call=call,
            index=index,
            tokens=encoded.ids,
            offsets=encoded.offsets,
            selections=selections,
            steering=steering,
        )

    def _selections(self, request: ActivationRequest) -> tuple[tuple[str, Selection], ...]:
        """What to keep of which SAE, each name and feature known."""
        for index, name in enumerate(request.saes):
            find_sae(self._engine, name, f"saes[{index}]")
        selection = request.selection
        if isinstance(selection, FeatureSelection):
            return self._by_sae(request.saes, selection)
        if isinstance(selection, TopKSelection):
            self._check_values("top_k", selection.k)
        return tuple((name, selection) for name in request.saes)

    def _by_sae(self, saes: Sequence[str], selection: FeatureSelection) -> tuple[tuple[str, Selection], ...]:
        self._check_values("features.features", len(selection.features))
        features: dict[str, list[FeatureRef]] = {name: [] for name in saes}
        for index, ref in enumerate(selection.features):
            field = f"features.features[{index}]"
            find_feature(self._engine, ref, field)
            if saes and ref.sae not in saes:
                raise InvalidRequest(f"{field}.sae", f"{ref.sae!r} is not in saes")
            features.setdefault(ref.sae, []).append(ref)
        for index, name in enumerate(saes):
            if not features[name]:
                raise InvalidRequest(f"saes[{index}]", f"no feature of {name!r} is named")
        return tuple((name, FeatureSelection(refs)) for name, refs in features.items())

    def _check_values(self, field: str, given: int) -> None:
        if given > self._limits.max_activation_values:
            raise InvalidRequest(field, f"at most {self._limits.max_activation_values} per token, got {given}")
