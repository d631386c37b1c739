"""GetActivations: which features fire on which token of each input, under edits if there are any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from saeguard.requests import ActivationRequest, FeatureSelection, Selection, TopKSelection
from saeguard.results import ActivationPart
from saeguard.types import FeatureRef
from saeguard_server.admission import Admission
from saeguard_server.caller import Call
from saeguard_server.engine.protocol import Engine, InspectTask
from saeguard_server.engine.tokenizer import Tokenizer, encode_input
from saeguard_server.errors import InvalidRequest
from saeguard_server.settings import LimitSettings
from saeguard_server.steering import TokenRange, compile_steering, find_feature, find_sae


class ReadActivations:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: LimitSettings, admission: Admission) -> None:
        self._engine, self._tokenizer, self._limits, self._admission = engine, tokenizer, limits, admission

    async def stream(self, request: ActivationRequest, call: Call) -> AsyncGenerator[ActivationPart]:
        """Parts of whole tokens, input by input; everything is checked before the first is read.

        Raises:
            UnknownName, InvalidRequest: what cannot be served as asked, by field, before any work.
            PermissionDenied, QuotaExceeded: what this caller may not, before any work.
            DeadlineExceeded, NonFiniteOutput, Unavailable, InternalFailure: from the engine.
        """
        async with self._admission.request(call.caller, request) as admitted:
            tasks = await asyncio.to_thread(self._compile, request, call)
            admitted.tokens.reserve(sum(len(task.tokens) for task in tasks))
            for task in tasks:
                await admitted.turn(len(task.tokens))
                async with aclosing(self._engine.inspect(task)) as parts:
                    admitted.tokens.charge(len(task.tokens))
                    async for part in parts:
                        yield part

    def _compile(self, request: ActivationRequest, call: Call) -> list[InspectTask]:
        selections = self._selections(request)
        tasks = []
        for index, input in enumerate(request.inputs):
            encoded = encode_input(self._tokenizer, input, self._engine.model.max_context, f"inputs[{index}].")
            tokens = TokenRange(encoded.ids, len(encoded.ids), self._tokenizer.special_ids)
            steering = compile_steering(self._engine, request.interventions, None, tokens)
            tasks.append(
                InspectTask(
                    call=call, index=index, tokens=encoded.ids, offsets=encoded.offsets, selections=selections,
                    steering=steering,
                )
            )  # fmt: skip
        return tasks

    def _selections(self, request: ActivationRequest) -> tuple[tuple[str, Selection], ...]:
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
        by_sae: dict[str, list[FeatureRef]] = {name: [] for name in saes}
        for index, ref in enumerate(selection.features):
            field = f"features.features[{index}]"
            find_feature(self._engine, ref, field)
            if saes and ref.sae not in saes:
                raise InvalidRequest(f"{field}.sae", f"{ref.sae!r} is not in saes")
            by_sae.setdefault(ref.sae, []).append(ref)
        for index, name in enumerate(saes):
            if not by_sae[name]:
                raise InvalidRequest(f"saes[{index}]", f"no feature of {name!r} is named")
        return tuple((name, FeatureSelection(refs)) for name, refs in by_sae.items())

    def _check_values(self, field: str, values: int) -> None:
        if values > self._limits.max_activation_values:
            raise InvalidRequest(field, f"at most {self._limits.max_activation_values} per token, got {values}")
