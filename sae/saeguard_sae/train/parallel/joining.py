"""From processes that torchrun started to a mesh."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.parallel.mesh import ALONE, Mesh
from saeguard_sae.train.parallel.parts import check_processes
from saeguard_sae.train.parallel.voice import is_launched
from saeguard_sae.train.parallel.watch import Watch

LAUNCH = "torchrun --nproc-per-node {} --no-python saeguard train CONFIG.toml"
_PATIENCE = timedelta(minutes=30)
"""A process that says nothing for so long is given up: the longest checkpoint must be written in less."""


@contextmanager
def together(shards: int, batch: int, device: str, kept: Callable[[], str]) -> Iterator[Mesh]:
    """The mesh of this process while it lasts; the one of ``ALONE`` where torchrun did not start it.

    Args:
        shards: parts of an SAE.
        batch: tokens that are dealt out.
        device: where it computes, by ``own_device``: with NCCL where that is a GPU, else with gloo.
        kept: what there is to go on from, should another process be lost.

    Raises:
        TrainError: so many processes cannot share them; names the field.
    """
    if not is_launched():
        if shards > 1:
            raise TrainError(f"parallel.shards: {shards} parts need as many processes: {LAUNCH.format(shards)}")
        yield ALONE
        return
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    mesh = mesh_of(shards, batch)
    watch = Watch(kept) if mesh.size > 1 else None
    yield mesh
    # Not where an error ends it: the others must see this process go.
    if watch is not None:
        dist.barrier()
        watch.close()
    dist.destroy_process_group()


def own_device(named: str) -> str:
    """The torch device where this process computes: of several GPUs the one of its number on its machine.

    Raises:
        TrainError: all of several processes would use the same one.
    """
    if not is_launched() or named == "cpu":
        return named
    if named != "cuda":
        raise TrainError(f"model.device: under torchrun must be cpu, or cuda for a GPU of its own each, got {named!r}")
    return f"cuda:{dist.get_node_local_rank()}"


def mesh_of(shards: int, batch: int) -> Mesh:
    """The mesh of this process, among all that have joined.

    Raises:
        TrainError: see ``check_processes``.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    check_processes(size, shards, batch)
    data = size // shards
    ranks = torch.arange(size).view(data, shards)
    by_rows = _group(ranks.T.tolist()) if data > 1 else None
    by_features = _group(ranks.tolist()) if shards > 1 else None
    mesh = Mesh(data, shards, rank, by_rows=by_rows, by_features=by_features)
    host = socket.gethostname()
    return replace(mesh, neighbours=mesh.told(host).count(host))


def _group(ranks: list[list[int]]) -> dist.ProcessGroup:
    """Of all groups the one that this process is in."""
    mine, _ = dist.new_subgroups_by_enumeration(ranks, timeout=_PATIENCE)  # type: ignore[no-untyped-call]
    assert isinstance(mine, dist.ProcessGroup)
    return mine
