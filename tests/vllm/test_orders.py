"""Orders travel whole, and those of another version are refused."""

from __future__ import annotations

import msgspec
import pytest

from saeguard.requests import Sampling
from saeguard_sae.edit_table import FOREVER
from saeguard_sae.edits import Affine
from saeguard_server.caller import Call
from saeguard_server.engine.protocol import GenerateTask, InspectTask, Pick, ResolvedEdit, Steering
from saeguard_server.engine.vllm import orders
from saeguard_server.errors import InternalFailure

SAES = ("first", "second")
EDITS = (
    ResolvedEdit("second", 7, "clamp", Affine(alpha=0.0, beta=2.5), 0, FOREVER, special=False),
    ResolvedEdit("first", 0, "floor", Affine(lo=-1.0), 3, 9, special=True, is_shadow=True, is_limited=False),
)


def generation(stop: tuple[str, ...] = (), **more: object) -> GenerateTask:
    return GenerateTask(
        call=Call("id", 0.0), tokens=(1, 2), sampling=Sampling(stop=stop), max_new_tokens=4, seed=1, **more
    )  # type: ignore[arg-type]


def test_edits_and_watched_features_come_back_as_they_were() -> None:
    task = generation(steering=Steering(EDITS, 0.25, "digest"), watch=(("second", 4),))
    packed = orders.worker_request(11, task, SAES)
    assert packed is not None
    found = orders.read_worker_request(packed)
    assert orders.steering_of_request(found, SAES) == Steering(EDITS, 0.25)
    assert (found.uid, found.watch, found.may_overrun) == (11, ((1, 4),), False)


def test_picks_come_back_as_they_were() -> None:
    picks = (Pick(sae="first", top_k=3), Pick(sae="second", threshold=0.5), Pick(sae="first", features=(4, 1)))
    task = InspectTask(call=Call("id", 0.0), index=0, tokens=(1,), offsets=(None,), picks=picks)
    packed = orders.worker_request(1, task, SAES)
    assert packed is not None
    assert orders.read_worker_request(packed).picks == (
        orders.WorkerSelection(0, 3, None, None),
        orders.WorkerSelection(1, None, 0.5, None),
        orders.WorkerSelection(0, None, None, (4, 1)),
    )


def test_a_plain_request_has_no_order_and_a_stop_string_is_told() -> None:
    assert orders.worker_request(1, generation(stop=("x",)), SAES) is None
    packed = orders.worker_request(1, generation(stop=("x",), steering=Steering(EDITS)), SAES)
    assert packed is not None
    assert orders.read_worker_request(packed).may_overrun


def test_an_order_of_another_version_is_refused() -> None:
    with pytest.raises(InternalFailure, match="version 99, the workers know 2"):
        orders.read_worker_request(msgspec.msgpack.encode([99, "whatever", {"it": "holds"}]))
