"""GetActivations: which features fire on which token of each input, under edits if there are any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from saeguard.requests import ActivationRequest, FeatureSelection, ModelInput, ThresholdSelection, TopKSelection
from saeguard.results import ActivationPart
from saeguard_server.admission import Admission
from saeguard_server.caller import Call
from saeguard_server.catalog import find_feature, find_sae
from saeguard_server.engine.protocol import Engine, InspectTask, Pick
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
        picks = self._picks(request)
        return [self._task(request, call, picks, index, one) for index, one in enumerate(request.inputs)]

    def _task(
        self, request: ActivationRequest, call: Call, picks: tuple[Pick, ...], index: int, prompt: ModelInput
    ) -> InspectTask:
        prefix = f"inputs[{index}]."
        encoded = encode_prompt(self._tokenizer, prompt, prefix)
        check_length(prompt, len(encoded.ids), self._engine.model.max_context, prefix)
        reach = TokenRange(encoded.ids, len(encoded.ids), self._tokenizer.special_ids)
        steering = resolve_steering(self._engine, request.interventions, None, reach)
        return InspectTask(
            call=call, index=index, tokens=encoded.ids, offsets=encoded.offsets, picks=picks, steering=steering
        )

    def _picks(self, request: ActivationRequest) -> tuple[Pick, ...]:
        for index, name in enumerate(request.saes):
            find_sae(self._engine, name, f"saes[{index}]")
        chosen = request.selection
        if isinstance(chosen, FeatureSelection):
            return self._named(request.saes, chosen)
        if isinstance(chosen, TopKSelection):
            self._check_values("top_k", chosen.k)
            return tuple(Pick(sae=name, top_k=chosen.k) for name in request.saes)
        assert isinstance(chosen, ThresholdSelection), "a selection is one of three"
        return tuple(Pick(sae=name, threshold=chosen.value) for name in request.saes)

    def _named(self, saes: Sequence[str], chosen: FeatureSelection) -> tuple[Pick, ...]:
        self._check_values("features.features", len(chosen.features))
        features: dict[str, list[int]] = {name: [] for name in saes}
        for index, ref in enumerate(chosen.features):
            field = f"features.features[{index}]"
            find_feature(self._engine, ref, field)
            if saes and ref.sae not in saes:
                raise InvalidRequest(f"{field}.sae", f"{ref.sae!r} is not in saes")
            features.setdefault(ref.sae, []).append(ref.feature)
        for index, name in enumerate(saes):
            if not features[name]:
                raise InvalidRequest(f"saes[{index}]", f"no feature of {name!r} is named")
        return tuple(Pick(sae=name, features=tuple(found)) for name, found in features.items())

    def _check_values(self, field: str, given: int) -> None:
        if given > self._limits.max_activation_values:
            raise InvalidRequest(field, f"at most {self._limits.max_activation_values} per token, got {given}")
