"""What a compiled model calls but does not look into: attention over blocks, edits, packed products.

A graph can hold numbers and tensors only, so the objects that do the work are found here by number.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_LIVE: WeakValueDictionary[int, Any] = WeakValueDictionary()
_HANDLES = itertools.count()


def register(worker: Any) -> int:
    """A number by which the ops find this object for as long as it lives."""
    handle = next(_HANDLES)
    _LIVE[handle] = worker
    return handle


@torch.library.custom_op("saeguard::linear", mutates_args=())
def linear(x: Tensor, handle: int, out_features: int) -> Tensor:
    """x [..., in] -> [..., out_features] by a ``PackedLinear``."""
    found: Tensor = _LIVE[handle].product(x)
    return found


@linear.register_fake
def _(x: Tensor, handle: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("saeguard::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, handle: int, layer: int, scaling: float, window: int, softcap: float
) -> Tensor:
    """q [1, heads, N, size], k and v [1, KV heads, N, size] -> [1, N, heads, size] by a ``Network``'s attention."""
    found: Tensor = _LIVE[handle].attention.attend(q, k, v, layer, scaling, window, softcap)
    return found


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: int, layer: int, scaling: float, window: int, softcap: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@torch.library.custom_op("saeguard::edit", mutates_args=())
def edit(x: Tensor, handle: int, place: int) -> Tensor:
    """x [1, N, width] at a hooked place of a ``Network`` -> the edited x, always a new tensor."""
    edited: Tensor = _LIVE[handle].edit(x, place)
    return edited.clone() if edited is x else edited


@edit.register_fake
def _(x: Tensor, handle: int, place: int) -> Tensor:
    return torch.empty_like(x)
