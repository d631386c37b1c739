"""What cannot be applied is refused by field, before any work."""

from __future__ import annotations

import pytest

from saeguard.requests import GenerateRequest
from saeguard.types import Clamp, FeatureRef, Scope, Zero
from saeguard_server.errors import InvalidRequest, UnknownName
from support.engines import World, greedy, make_world, running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("llama"))


def steered(*interventions: object, new: int = 4, ids: tuple[int, ...] = (1, 2)) -> GenerateRequest:
    return greedy(list(ids), new, interventions=interventions)


ONLY_PROMPT = Scope(phase="prompt")


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (steered(Zero("nope", 1)), UnknownName, r"interventions\[0\]\.sae: no SAE 'nope'"),
        (steered(Zero("resid_pre", 96)), InvalidRequest, r"interventions\[0\]\.feature: must be 0 to 95"),
        (steered(Clamp("resid_pre", 1, 1.0, unit="max")), InvalidRequest, r"interventions\[0\]\.clamp\.unit"),
        (
            steered(Zero("resid_pre", 1, scope=Scope(phase="generated", start=2)), new=1),
            InvalidRequest,
            r"\.scope: selects no token",
        ),
        (steered(Zero("resid_pre", 1, scope=Scope(phase="prompt", start=2))), InvalidRequest, "selects no token"),
        (steered(Zero("resid_pre", 1, scope=ONLY_PROMPT), ids=(256,)), InvalidRequest, "selects no token"),
        (greedy([1, 2], 4, watch=(FeatureRef("resid_pre", 96),)), InvalidRequest, r"watch\[0\]\.feature"),
        (greedy([1, 999], 4), InvalidRequest, r"tokens\.ids\[1\]: must be 0 to 259, got 999"),
        (greedy([1], 4, max_relative_edit=0.5), InvalidRequest, "max_relative_edit: has nothing to limit"),
    ],
)
async def test_what_cannot_be_applied_is_refused_by_field(
    world: World, request_: GenerateRequest, error: type[Exception], says: str
) -> None:
    with running(world.settings()) as one:
        with pytest.raises(error, match=says):
            await one.ask(request_)
        assert one.engine._core.scheduler.slots_in_use == 0
