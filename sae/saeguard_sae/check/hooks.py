"""Seeing, and replacing, the activations at sites while a model reads one text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saeguard_sae.architectures import Located, ModelConfig, depth, locate
from saeguard_sae.site import Site

Visit: TypeAlias = Callable[[Site, Tensor, Tensor], Tensor | None]
"""``visit(site, x, seen)``: the module's own tensor [1, T, width] and what an SAE reads there; returns what takes the
place of x, None to leave it."""


@contextmanager
def visiting(model: nn.Module, config: ModelConfig, sites: Iterable[Site], visit: Visit) -> Iterator[None]:
    """While it lasts, ``visit`` is called at these sites in every forward pass, in the order of the pass.

    Raises:
        ValueError: the model lacks one.
    """
    handles: list[RemovableHandle] = []
    try:
        for site in sorted(set(sites), key=depth):
            handles.append(_attach(site, locate(model, config, site), visit))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [T] -> logits [T, vocabulary]."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids[None].to(device), use_cache=False).logits
    return logits[0]


def ordinary(ids: Tensor, special_ids: frozenset[int]) -> Tensor:
    """ids [T], a whole text -> bool [T], which of its tokens are counted and spliced.

    Not the first one, special or not: where no BOS takes that part, models make it an attention sink, whose activation
    is so long, and so unlike all others, that a few of them decide the sums.
    """
    is_special = torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype, device=ids.device))
    return ~is_special & (torch.arange(len(ids), device=ids.device) > 0)


def _attach(site: Site, where: Located, visit: Visit) -> RemovableHandle:
    def visited(value: Any) -> Any:
        is_alone = isinstance(value, Tensor)
        x = value if is_alone else value[0]
        new = visit(site, x, x if where.see is None else where.see(x))
        if new is None:
            return None
        if where.shared:
            # The block adds this very tensor to the MLP's output: a new one would reach the MLP alone.
            x.copy_(new)
            return None
        return new if is_alone else (new, *value[1:])

    if where.side == "in":
        return where.module.register_forward_pre_hook(lambda _, args: visited(args))
    return where.module.register_forward_hook(lambda _, __, out: visited(out))
