"""What several processes can train together."""

from __future__ import annotations

from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.parallel.mesh import Mesh
from saeguard_sae.train.settings import SaeSettings


def check_processes(count: int, shards: int, batch: int) -> None:
    """Looks whether so many processes can deal out features and batches.

    Raises:
        TrainError: they cannot; names the field and what is allowed.
    """
    if count % shards:
        raise TrainError(f"parallel.shards: must divide the number of processes, {count}, got {shards}")
    if batch % (count // shards):
        raise TrainError(
            f"stream.batch: must be a multiple of {count // shards}, by which it is dealt out, got {batch}"
        )


def check_parts(settings: SaeSettings, mesh: Mesh) -> None:
    """Looks whether batch and features can be dealt out.

    Raises:
        ValueError: they cannot; names the field and what is allowed.
    """
    if settings.batch % mesh.data:
        raise ValueError(f"batch must be a multiple of {mesh.data}, by which it is dealt out, got {settings.batch}")
    if settings.d_sae % mesh.shards:
        raise ValueError(f"d_sae must be a multiple of parallel.shards, {mesh.shards}, got {settings.d_sae}")
    if settings.smooth_weight and mesh.size > 1:
        raise ValueError("smooth_weight needs one process: its cost is of variances over all of a batch")
