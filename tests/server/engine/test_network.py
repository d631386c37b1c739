"""The compiled model gives the plain one's answers, steered and not, whatever the batch looks like.

Compiling takes half a minute. "all" compiles what "attention" does and the model as well, so it is what runs by
default; SAEGUARD_TEST_COMPILE=attention,all runs both.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from saeguard.requests import GenerateRequest
from saeguard.types import Clamp, Scale, Scope
from saeguard_server.engine.protocol import Origin
from saeguard_server.steering import compile_edit
from support.alone import Alone
from support.engines import World, greedy, make_world, prompt
from support.stepping import Loaded, policy_task

ASKED = os.environ.get("SAEGUARD_TEST_COMPILE", "all").split(",")

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's compiler uses what torch deprecates
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("llama"))


def requests() -> list[GenerateRequest]:
    """Prompts in parts, single tokens, several groups; steered and not."""
    steers = (
        (),
        (Clamp("resid_post", 4, 4.0), Scale("attn_z", 2, -3.0, scope=Scope(phase="generated"))),
        (Clamp("mlp_out", 9, 1.0, scope=Scope(phase="prompt")), Scale("resid_mid", 3, 2.0)),
    )
    lengths = (1, 40, 7, 17, 33, 2, 64)
    return [greedy(prompt(60 + seed, n), 6 + seed, interventions=steers[seed % 3]) for seed, n in enumerate(lengths)]


@pytest.mark.parametrize("what", ["attention", "all"])
def test_compiled_is_as_plain(what: str, world: World) -> None:
    if what not in ASKED:
        pytest.skip(f"SAEGUARD_TEST_COMPILE names {','.join(ASKED)}")
    loaded, alone = Loaded(world, compile=what), Alone(world)
    one = loaded.core(prefill_tokens=25)
    graphs = _graphs()
    asked = [one.ask(request) for request in requests()]
    one.finish()
    for request, got in zip(requests(), asked, strict=True):
        alone.check(request, got.answer)
    single = requests()[3]
    alone.check(single, one.answer(single))
    steered, rule = requests()[1], Scale("resid_post", 9, -2.0)
    ruled = policy_task(one, steered, [compile_edit(one.engine, rule, "rules[0]", Origin("safety", "rule"))], [])
    one.finish()
    assert ruled.answer.ids == alone.under([rule], steered).tokens
    assert one.is_empty()
    assert _graphs() == graphs, "a request waited for the compiler"


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
