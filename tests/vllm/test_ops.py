"""The ops change their tensors in place, and nothing that nobody edits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saeguard_server.engine.vllm import steering


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    yield
    steering.install_edits([])


def second_row(x: Tensor) -> Tensor:
    out = x.clone()
    out[1] += 1.5
    return out


def test_an_idle_place_writes_nothing() -> None:
    steering.install_edits([lambda x: x])
    x, hidden, residual = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    before = [one.clone() for one in (x, hidden, residual)]
    version = x._version
    torch.ops.saeguard_vllm.edit(x, 0)
    torch.ops.saeguard_vllm.edit_sum(hidden, residual, 0)
    assert x._version == version
    for one, other in zip((x, hidden, residual), before, strict=True):
        assert torch.equal(one, other)


def test_one_tensor_becomes_what_it_is_edited_to() -> None:
    steering.install_edits([lambda x: x, second_row])
    x = torch.randn(3, 4)
    wanted = second_row(x)
    torch.ops.saeguard_vllm.edit(x, 1)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_in_two_tensors_becomes_the_edited_sum(dtype: torch.dtype) -> None:
    steering.install_edits([second_row])
    hidden, residual = torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)
    before, wanted = (hidden.clone(), residual.clone()), second_row(hidden + residual)
    torch.ops.saeguard_vllm.edit_sum(hidden, residual, 0)
    assert torch.equal(hidden + residual, wanted)
    for one, other in zip((hidden, residual), before, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_they_stand_in_a_compiled_graph() -> None:
    steering.install_edits([second_row])

    def model(x: Tensor) -> Tensor:
        hidden = x * 2
        residual = x + 1
        torch.ops.saeguard_vllm.edit_sum(hidden, residual, 0)
        return hidden + residual

    x = torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), second_row(x * 2 + (x + 1)))
