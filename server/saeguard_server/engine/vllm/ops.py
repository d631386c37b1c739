"""The ops that vLLM's compiled graphs call at every site: a graph holds numbers and tensors, the tables are found here.

They change their tensors in place, so that an idle site costs no copy, and where nobody edits nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Edit: TypeAlias = Callable[[Tensor], Tensor]
"""x [N, width] as the model made it -> as it goes on with it; x itself where nobody edits."""

_PLACES: list[Edit] = []
"""Of the one model that a worker process runs, by the number that its graph holds."""

_LIBRARY: Any = torch.library.Library("saeguard_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("edit(Tensor(a!) x, int place) -> ()")
_LIBRARY.define("edit_sum(Tensor(a!) hidden, Tensor(b!) residual, int place) -> ()")


def install(places: list[Edit]) -> None:
    """Makes these the process' places, numbered from 0; those before them are gone."""
    _PLACES[:] = places


def _edit(x: Tensor, place: int) -> None:
    edited = _PLACES[place](x)
    if edited is not x:
        x.copy_(edited)


def _edit_sum(hidden: Tensor, residual: Tensor, place: int) -> None:
    """The stream in two tensors, of which the model goes on with the sum."""
    x = hidden + residual
    edited = _PLACES[place](x)
    if edited is x:
        return
    # Only tokens that changed are written, whole into one of the two: the others' sums stay what they were, to the bit.
    changed = (edited != x).any(dim=-1, keepdim=True)
    hidden.copy_(torch.where(changed, edited, hidden))
    residual.masked_fill_(changed, 0.0)


_LIBRARY.impl("edit", _edit, "CompositeExplicitAutograd")
_LIBRARY.impl("edit_sum", _edit_sum, "CompositeExplicitAutograd")


# A graph is traced without data: they change nothing that it needs to know.
torch.library.register_fake("saeguard_vllm::edit", lambda x, place: None)
torch.library.register_fake("saeguard_vllm::edit_sum", lambda hidden, residual, place: None)
