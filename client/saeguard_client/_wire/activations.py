"""GetActivations: the selection goes out, parts of sparse matrices come back."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from saeguard.v1 import activation_service_pb2 as pb
from saeguard_client import _checks
from saeguard_client._wire import request
from saeguard_client._wire.mirror import decode
from saeguard_client.activations import ActivationPart, Activations, TokenText, merge
from saeguard_client.calls import GatheredCall, PerCall, StreamCall
from saeguard_client.catalog import FeatureRef
from saeguard_client.errors import malformed
from saeguard_client.interventions import Intervention

_SERVICE = pb.DESCRIPTOR.services_by_name["ActivationService"].full_name


def call(
    inputs: object, saes: Iterable[str], selection: dict[str, Any], steer: Iterable[Intervention], options: PerCall
) -> GatheredCall[list[Activations], ActivationPart]:
    """Raises ValueError naming the argument that the wire cannot hold."""
    # A lone string is one input: taken as a sequence it would be one per character.
    several = [inputs] if isinstance(inputs, str) else list(request.iterable("inputs", inputs))
    message = pb.GetActivationsRequest(
        inputs=[pb.ActivationInput(**request.prompt(f"inputs[{i}]", one)) for i, one in enumerate(several)],
        saes=[_checks.text(f"saes[{i}]", name) for i, name in enumerate(request.iterable("saes", saes))],
        interventions=request.interventions("steer", steer),
        **selection,
    )
    parts = StreamCall(
        f"/{_SERVICE}/GetActivations", message.SerializeToString(), lambda: PartReader(len(several)), options
    )
    return GatheredCall(parts, merge)


def selection(top_k: int | None, threshold: float | None, features: Iterable[FeatureRef] | None) -> dict[str, Any]:
    """The one field of the wire's ``selection``.

    Raises:
        ValueError: not exactly one of the three is given.
    """
    if sum(given is not None for given in (top_k, threshold, features)) != 1:
        raise ValueError("top_k: give one of top_k, threshold and features")
    if top_k is not None:
        return {"top_k": _checks.whole("top_k", top_k)}
    if threshold is not None:
        return {"threshold": _checks.number("threshold", threshold)}
    return {"features": pb.FeatureSelection(features=request.features("features", features or ()))}


class PartReader:
    """Reads one stream and watches that nothing of it is missing."""

    def __init__(self, num_inputs: int) -> None:
        self._num_inputs = num_inputs
        self._read: dict[tuple[int, str], int] = {}
        self._open: set[tuple[int, str]] = set()

    def read(self, message: bytes) -> ActivationPart:
        """One part, which begins where the one before it ended."""
        reply = decode(pb.GetActivationsResponse, message)
        pair = (reply.input, reply.sae)
        if reply.start != self._read.get(pair, 0):
            raise malformed(f"a part of input {reply.input} under {reply.sae!r} is missing")
        self._read[pair] = reply.start + len(reply.tokens)
        self._open.add(pair)
        if reply.last:
            self._open.remove(pair)
        return _part(reply)

    def finish(self) -> None:
        """Every pair that began has ended, and every input was read."""
        if self._open or {index for index, _ in self._read} != set(range(self._num_inputs)):
            raise malformed("the stream ended before the last activations")


def _part(reply: pb.GetActivationsResponse) -> ActivationPart:
    try:
        return ActivationPart(
            input=reply.input,
            sae=reply.sae,
            tokens=tuple(_token(token) for token in reply.tokens),
            indptr=array("q", reply.indptr),
            indices=array("I", reply.indices),
            values=array("f", reply.values),
            start=reply.start,
            last=reply.last,
        )
    except ValueError as err:
        raise malformed(str(err)) from err


def _token(token: pb.TokenText) -> TokenText:
    """By hand where everything else goes through ``mirror``: there may be a hundred thousand of them."""
    return TokenText(token.id, token.text, token.offset if token.HasField("offset") else None)
