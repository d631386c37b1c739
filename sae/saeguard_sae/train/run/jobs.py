"""The SAEs of a configuration, once the widths of their sites are known, and what a run will need of memory and disk.

A run that needs more than there is is refused before work is lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from saeguard_sae.formats import saelens_save
from saeguard_sae.models import Site, free_bytes
from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.parallel import ALONE, Mesh, check_parts
from saeguard_sae.train.run.config import BadConfig, RunConfig
from saeguard_sae.train.settings import Precision, SaeSettings

_FLOAT = 4
_PRE_ACTIVATION_ROWS = 512
"""Tokens whose pre-activations an SAE that selects has room for, whatever the batch, and the copies made of them."""
_PRE_ACTIVATION_COPIES = 2
_PROPOSING_BYTES: Mapping[Precision, int] = {"int8": 1, "bfloat16": 2, "float32": 0}
"""Bytes of a number in the copy of the encoder that proposes features; float32 needs none."""
_DENSE_COPIES = 6
"""Tensors [batch, d_sae] that an SAE which pays for firing holds between forward and backward."""
_REHEARSED = 16
"""Features of the SAE that stands in for one before it is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaePlan:
    """One SAE that is to be trained, with the widths of what it reads and writes."""

    name: str
    reads: Site
    writes: Site | None
    """Of a transcoder."""
    settings: SaeSettings
    d_in: int
    d_out: int

    @property
    def weights(self) -> int:
        return self.settings.d_sae * (self.d_in + self.d_out + 1) + self.d_out

    def training_bytes(self, mesh: Mesh = ALONE) -> int:
        """Weights, gradients, two moments, the encoder's copy that proposes, and what a step holds: of it the part of
        one process of several."""
        settings = self.settings
        proposing = _PROPOSING_BYTES[settings.precision] * settings.d_sae * self.d_in
        batch = settings.batch // mesh.data
        if settings.is_selecting:
            step = _PRE_ACTIVATION_COPIES * _PRE_ACTIVATION_ROWS * settings.d_sae
        else:
            step = _DENSE_COPIES * batch * settings.d_sae
        tokens = 4 * batch * (self.d_in + self.d_out)
        return (4 * _FLOAT * self.weights + proposing + _FLOAT * step) // mesh.shards + _FLOAT * tokens

    def checkpoint_bytes(self) -> int:
        """Weights and moments, and a clock for each feature."""
        return _FLOAT * (3 * self.weights + 2 * self.settings.d_sae)

    def export_bytes(self) -> int:
        return _FLOAT * self.weights


def plan_saes(config: RunConfig, widths: Mapping[Site, int], mesh: Mesh = ALONE) -> tuple[SaePlan, ...]:
    """Every SAE of the configuration."""
    plans = []
    for entry in config.saes:
        d_in = widths[entry.reads]
        d_out = d_in if entry.writes is None else widths[entry.writes]
        try:
            settings = entry.sae_settings(d_in, config.steps, config.stream.batch)
            check_parts(settings, mesh)
        except ValueError as err:
            raise BadConfig(f"saes.{entry.name}: {err}") from err
        plans.append(
            SaePlan(name=entry.name, reads=entry.reads, writes=entry.writes, settings=settings, d_in=d_in, d_out=d_out)
        )
    return tuple(plans)


def rehearse_export(plan: SaePlan, sample: Mapping[Site, Tensor], model_name: str) -> None:
    """Writes a small untrained SAE of the same kind, so that what the format cannot hold shows before work is done.

    Args:
        sample: activations [tokens, width] at its sites.
    """
    small = replace(plan.settings, d_sae=_REHEARSED, k=min(plan.settings.k, 1), widths=(), steps=1, kernels="torch")
    target = None if plan.writes is None else sample[plan.writes]
    with TemporaryDirectory() as folder:
        try:
            dictionary = make_learner(small, sample[plan.reads], target).export()
            writes = () if plan.writes is None else (plan.writes,)
            saelens_save.save_saelens(dictionary, Path(folder), site=plan.reads, model_name=model_name, writes=writes)
        except ValueError as err:
            raise BadConfig(f"saes.{plan.name}: its SAE could not be written: {err}") from err


def check_memory(plans: Sequence[SaePlan], stream_bytes: int, device: torch.device, mesh: Mesh = ALONE) -> None:
    """The model is loaded by now, and so no longer part of what is available.

    Args:
        device: where the SAEs learn and the buffer is.
        mesh: of the processes that each have them, those of this machine in one memory unless it is a GPU's.
    """
    free = free_bytes(device)
    mesh.gather_objects(None)  # nobody takes memory before all have looked
    sharing = mesh.neighbours if device.type == "cpu" else 1
    needs = {plan.name: sharing * plan.training_bytes(mesh) for plan in plans}
    # A checkpoint holds a copy of the buffer while it is written; SAEs are copied one by one, after the buffer is gone,
    # but put together before that where they are in parts.
    rest = (sharing + 1) * stream_bytes
    if mesh.shards > 1 and device.type == "cpu":
        rest += sum(plan.checkpoint_bytes() for plan in plans)
    needed = sum(needs.values()) + rest
    if needed <= free:
        return
    parts = [f"{name} {gib(need)}" for name, need in sorted(needs.items(), key=lambda item: -item[1])[:5]]
    if len(needs) > 5:
        parts.append(f"{len(needs) - 5} more SAEs")
    parts.append(f"the buffer{' and checkpoints' if mesh.shards > 1 else ''} {gib(rest)}")
    raise BadConfig(
        f"saes: training would need about {gib(needed)} on {device}, where {gib(free)} are available beside the model"
        f" ({', '.join(parts)}); lower d_sae or expansion, the number of SAEs, or stream.buffer"
    )


def check_disk(plans: Sequence[SaePlan], stream_bytes: int, keep: int, folder: Path) -> None:
    """Room for the kept checkpoints, one more while it is written, and the SAEs; what is there counts as room."""
    checkpoint = sum(plan.checkpoint_bytes() for plan in plans) + stream_bytes
    needed = (keep + 1) * checkpoint + sum(plan.export_bytes() for plan in plans)
    reusable = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free + reusable:
        raise BadConfig(
            f"run.out: {keep + 1} checkpoints of {gib(checkpoint)} and the SAEs need {gib(needed)}, and {folder} has"
            f" {gib(free)} free; lower run.keep, stream.buffer or the SAEs' d_sae, or name another disk"
        )


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())
