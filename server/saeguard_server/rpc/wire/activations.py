"""GetActivations: the request, and parts cut into messages that every client accepts (4 MiB is gRPC's default)."""

from __future__ import annotations

from collections.abc import Iterator

from saeguard.v1 import activation_service_pb2 as pb
from saeguard_server.errors import InvalidRequest
from saeguard_server.reply import ActivationPart, TokenText
from saeguard_server.request import ActivationRequest, Named, Selection, Threshold, TopK
from saeguard_server.rpc.wire.fields import at, at_most, chosen
from saeguard_server.rpc.wire.inputs import model_input
from saeguard_server.rpc.wire.interventions import feature_refs, interventions
from saeguard_server.settings import LimitSettings

MESSAGE_BYTES = 1_000_000
"""About what a message may hold; one token's activations are never cut."""
TOKEN_BYTES = 24
"""Of a token besides its text: id, offset, a row pointer, and the framing of each."""
ENTRY_BYTES = 9
"""Of one activation: a float, and an index of at most five bytes."""


def activation_request(message: pb.GetActivationsRequest, limits: LimitSettings) -> ActivationRequest:
    """What GetActivations asks for.

    Raises:
        InvalidRequest: names the field.
    """
    at_most(limits.max_activation_inputs, message.inputs, "inputs")
    inputs = tuple(model_input(one, f"inputs[{index}]") for index, one in enumerate(message.inputs))
    if "" in message.saes:
        raise InvalidRequest(f"saes[{list(message.saes).index('')}]", "must not be empty")
    selection = _selection(message, limits.max_activation_values)
    edits = interventions(message.interventions, limits.max_interventions)
    with at(""):
        return ActivationRequest(inputs=inputs, saes=tuple(message.saes), selection=selection, interventions=edits)


def responses(part: ActivationPart) -> Iterator[pb.GetActivationsResponse]:
    """A part as one message, or as several of consecutive tokens where it is large."""
    first = 0
    for after in _cuts(part):
        yield _rows(part, first, after)
        first = after


def _selection(message: pb.GetActivationsRequest, limit: int) -> Selection:
    kind = chosen(message, "selection", "selection")
    with at(""):
        if kind == "threshold":
            return Threshold(message.threshold)
        if kind == "top_k":
            if message.top_k > limit:
                raise InvalidRequest("top_k", f"at most {limit}, got {message.top_k}")
            return TopK(message.top_k)
    at_most(limit, message.features.features, "features.features")
    named = feature_refs(message.features.features, "features.features")
    with at("features"):
        return Named(named)


def _cuts(part: ActivationPart) -> Iterator[int]:
    """Ends of the runs of rows that fit a message; the last one is the number of rows."""
    size, rows = 0, len(part.tokens)
    for row, token in enumerate(part.tokens):
        entries = part.indptr[row + 1] - part.indptr[row]
        cost = TOKEN_BYTES + 4 * len(token.text) + ENTRY_BYTES * entries
        if size and size + cost > MESSAGE_BYTES:
            yield row
            size = 0
        size += cost
    yield rows


def _rows(part: ActivationPart, first: int, after: int) -> pb.GetActivationsResponse:
    low, high = part.indptr[first], part.indptr[after]
    return pb.GetActivationsResponse(
        input=part.input,
        sae=part.sae,
        start=part.start + first,
        tokens=[_token(one) for one in part.tokens[first:after]],
        indptr=[pointer - low for pointer in part.indptr[first : after + 1]],
        indices=part.indices[low:high],
        values=part.values[low:high],
        last=part.last and after == len(part.tokens),
    )


def _token(token: TokenText) -> pb.TokenText:
    return pb.TokenText(id=token.id, text=token.text, offset=token.offset)
