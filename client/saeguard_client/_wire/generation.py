"""Generate, GenerateStream and Compare: the same request; one completion, its chunks, or two completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from saeguard.v1 import generation_service_pb2 as pb
from saeguard_client import _checks, errors
from saeguard_client._wire import request
from saeguard_client._wire.mirror import decode, read, values
from saeguard_client.calls import EitherCall, PerCall, StreamCall, UnaryCall
from saeguard_client.catalog import FeatureRef
from saeguard_client.errors import malformed
from saeguard_client.interventions import Intervention
from saeguard_client.results import Comparison, Completion, FeatureReading, StreamChunk, Token
from saeguard_client.sampling import Sampling
from saeguard_client.triggers import Trigger

_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a generation asks for, beside its deadline."""

    input: object
    sampling: Sampling
    steer: Iterable[Intervention]
    max_relative_edit: float | None
    watch: Iterable[FeatureRef]
    triggers: Iterable[Trigger]
    policies: Iterable[str]
    conversation: str | None
    min_policy_activation: int | None
    check_receipt: bool

    def __post_init__(self) -> None:
        # Read more than once: to send, and to compare with the receipt.
        for name in ("steer", "watch", "triggers", "policies"):
            object.__setattr__(self, name, tuple(request.iterable(name, getattr(self, name))))
        _checks.flag("check_receipt", self.check_receipt)

    def checked(self, done: Completion) -> Completion:
        """``done``, if it accounts for what was asked.

        Raises:
            ReceiptMismatch: it does not.
        """
        if self.check_receipt:
            errors.check(done, self.steer, self.triggers, self.policies)
        return done


def call(generation: Generation, options: PerCall) -> EitherCall[Completion, StreamChunk]:
    """Raises ValueError naming the argument that the wire cannot hold."""
    message = _request(generation)

    def read(data: bytes) -> Completion:
        return generation.checked(_whole(decode(pb.GenerateResponse, data)))

    return EitherCall(
        UnaryCall(f"/{_SERVICE}/Generate", message, read, options),
        StreamCall(f"/{_SERVICE}/GenerateStream", message, lambda: ChunkReader(generation.checked), options),
    )


def compare(generation: Generation, options: PerCall) -> UnaryCall[Comparison]:
    """Compare; raises ValueError naming the argument that the wire cannot hold."""

    def read(data: bytes) -> Comparison:
        reply = decode(pb.CompareResponse, data)
        return Comparison(
            steered=generation.checked(_whole(reply.steered)),
            unsteered=_whole(reply.unsteered),
            first_divergence=reply.first_divergence if reply.HasField("first_divergence") else None,
            kl_nats=tuple(reply.kl_nats),
        )

    return UnaryCall(f"/{_SERVICE}/Compare", _request(generation), read, options)


def _request(generation: Generation) -> bytes:
    limit, oldest = generation.max_relative_edit, generation.min_policy_activation
    conversation = generation.conversation
    message = pb.GenerateRequest(
        **request.prompt("input", generation.input),
        sampling=pb.Sampling(**{field.name: getattr(generation.sampling, field.name) for field in fields(Sampling)}),
        interventions=request.interventions("steer", generation.steer),
        max_relative_edit=None if limit is None else _checks.number("max_relative_edit", limit),
        watch=request.features("watch", generation.watch),
        triggers=request.triggers("triggers", generation.triggers),
        policies=[_checks.text(f"policies[{i}]", name) for i, name in enumerate(generation.policies)],
        conversation="" if conversation is None else _checks.text("conversation", conversation),
        min_policy_activation=(
            None if oldest is None else _checks.whole("min_policy_activation", oldest, _checks.MAX_UINT64)
        ),
    )
    return message.SerializeToString()


def _whole(message: pb.GenerateResponse) -> Completion:
    if not message.HasField("completion"):
        raise malformed("a completion is missing")
    tokens, readings = _tokens(message), _readings(message)
    return _finished(message.completion, message.text, tokens, readings, tuple(message.prompt_logprobs))


class ChunkReader:
    """Reads one stream and keeps what the completion at its end is made of, which ``check`` sees first."""

    def __init__(self, check: Callable[[Completion], Completion]) -> None:
        self._check = check
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self._readings: list[FeatureReading] = []
        self._prompt_logprobs: list[float] = []
        self._is_finished = False

    def read(self, message: bytes) -> StreamChunk:
        """One chunk; the last has the completion."""
        if self._is_finished:
            raise malformed("a message came after the completion")
        reply = decode(pb.GenerateResponse, message)
        tokens, readings = _tokens(reply), _readings(reply)
        self._text.append(reply.text)
        self._tokens.extend(tokens)
        self._readings.extend(readings)
        self._prompt_logprobs.extend(reply.prompt_logprobs)
        self._is_finished = reply.HasField("completion")
        return StreamChunk(reply.text, tokens, readings, self._whole(reply.completion) if self._is_finished else None)

    def finish(self) -> None:
        """A stream that just stops must not pass for a finished text."""
        if not self._is_finished:
            raise malformed("the stream ended without a completion")

    def _whole(self, end: pb.Completion) -> Completion:
        text, tokens, readings = "".join(self._text), tuple(self._tokens), tuple(self._readings)
        return self._check(_finished(end, text, tokens, readings, tuple(self._prompt_logprobs)))


def _finished(
    end: pb.Completion,
    text: str,
    tokens: tuple[Token, ...],
    readings: tuple[FeatureReading, ...],
    prompt_logprobs: tuple[float, ...],
) -> Completion:
    return Completion(
        text=text, tokens=tokens, readings=readings, prompt_logprobs=prompt_logprobs, **values(Completion, end)
    )


def _tokens(message: pb.GenerateResponse) -> tuple[Token, ...]:
    return tuple(read(Token, token) for token in message.tokens)


def _readings(message: pb.GenerateResponse) -> tuple[FeatureReading, ...]:
    return tuple(read(FeatureReading, reading) for reading in message.readings)
