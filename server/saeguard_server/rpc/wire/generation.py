"""GenerationService's request and responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from saeguard.v1 import generation_service_pb2 as pb
from saeguard_server.errors import InternalFailure
from saeguard_server.generation import Comparison
from saeguard_server.reply import Chunk, Completion, FeatureReading, FinishReason, Token
from saeguard_server.request import GenerationRequest, Sampling
from saeguard_server.rpc.wire.conditions import triggers
from saeguard_server.rpc.wire.fields import at, at_most
from saeguard_server.rpc.wire.inputs import model_input
from saeguard_server.rpc.wire.interventions import feature_refs, interventions
from saeguard_server.rpc.wire.receipt import receipt
from saeguard_server.settings import LimitSettings

FINISH_REASONS: Mapping[FinishReason, pb.FinishReason.ValueType] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "feature": pb.FINISH_REASON_FEATURE,
}


def generation_request(message: pb.GenerateRequest, limits: LimitSettings) -> GenerationRequest:
    """What a generation asks for.

    Raises:
        InvalidRequest: names the field.
    """
    at_most(limits.max_watch, message.watch, "watch")
    prompt = model_input(message)
    edits = interventions(message.interventions, limits.max_interventions)
    watch = feature_refs(message.watch, "watch")
    rules = triggers(message.triggers, limits.max_triggers, limits.max_interventions)
    at_most(limits.max_policies, message.policies, "policies")
    with at(""):
        return GenerationRequest(
            prompt=prompt,
            sampling=_sampling(message.sampling),
            interventions=edits,
            max_relative_edit=message.max_relative_edit if message.HasField("max_relative_edit") else None,
            watch=watch,
            triggers=rules,
            policies=tuple(message.policies),
            conversation=message.conversation,
            min_policy_activation=(
                message.min_policy_activation if message.HasField("min_policy_activation") else None
            ),
        )


def chunk_response(chunk: Chunk, request_id: str) -> pb.GenerateResponse:
    """One message of the stream."""
    return pb.GenerateResponse(
        text=chunk.text,
        tokens=[_token(token) for token in chunk.tokens],
        readings=[_reading(reading) for reading in chunk.readings],
        prompt_logprobs=chunk.prompt_logprobs,
        completion=None if chunk.completion is None else _completion(chunk.completion, request_id),
    )


def whole_response(chunks: Sequence[Chunk], request_id: str) -> pb.GenerateResponse:
    """The stream as one message.

    Raises:
        InternalFailure: the stream did not end with a completion.
    """
    if not chunks or chunks[-1].completion is None:
        raise InternalFailure("a generation ended without its completion")
    return pb.GenerateResponse(
        text="".join(chunk.text for chunk in chunks),
        tokens=[_token(token) for chunk in chunks for token in chunk.tokens],
        readings=[_reading(reading) for chunk in chunks for reading in chunk.readings],
        prompt_logprobs=[value for chunk in chunks for value in chunk.prompt_logprobs],
        completion=_completion(chunks[-1].completion, request_id),
    )


def compare_response(comparison: Comparison, request_id: str) -> pb.CompareResponse:
    """Both completions."""
    return pb.CompareResponse(
        steered=whole_response(comparison.steered, request_id),
        unsteered=whole_response(comparison.unsteered, request_id),
        first_divergence=comparison.first_divergence,
        kl_nats=comparison.kl_nats,
    )


def _sampling(message: pb.Sampling) -> Sampling:
    # ListFields gives what was set: explicitly where the field is optional, to something else than zero elsewhere.
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    with at("sampling"):
        return Sampling(**given)


def _token(token: Token) -> pb.Token:
    top = [pb.TokenLogprob(id=one.id, logprob=one.logprob) for one in token.top]
    return pb.Token(id=token.id, logprob=token.logprob, top_logprobs=top)


def _reading(reading: FeatureReading) -> pb.FeatureReading:
    return pb.FeatureReading(position=reading.position, values=reading.values)


def _completion(done: Completion, request_id: str) -> pb.Completion:
    times = done.timings
    return pb.Completion(
        finish_reason=FINISH_REASONS[done.finish_reason],
        stop_string=done.stop_string,
        usage=pb.Usage(prompt_tokens=done.prompt_tokens, generated_tokens=done.generated_tokens),
        timings=pb.Timings(
            queue_s=times.queue_s, time_to_first_token_s=times.time_to_first_token_s, total_s=times.total_s
        ),
        receipt=None if done.receipt is None else receipt(done.receipt),
        seed=done.seed,
        request_id=request_id,
        stopped_by=None if done.stopped_by is None else pb.StoppedBy(**asdict(done.stopped_by)),
        policy=None if done.policy is None else pb.PolicyFacts(**asdict(done.policy)),
    )
