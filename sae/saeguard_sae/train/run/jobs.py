"""The SAEs of a configuration, once the model has told how wide its sites are."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.formats import saelens_save
from saeguard_sae.models import Site, free_bytes
from saeguard_sae.train.data import context_length
from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.parallel import ALONE, Mesh, check_parts
from saeguard_sae.train.run.config import BadConfig, RunConfig
from saeguard_sae.train.settings import Precision, SaeSettings
from saeguard_sae.train.stream import ActivationStream, buffer_bytes

# What a run will need of memory and disk, and what there is, so that it is refused before work is lost.


_FLOAT = 4
_PRE_ACTIVATION_ROWS = 512
"""Tokens whose pre-activations an SAE that selects has room for, whatever the batch, and the copies made of them."""
_PRE_ACTIVATION_COPIES = 2
_ROUGH: Mapping[Precision, int] = {"int8": 1, "bfloat16": 2, "float32": 0}
"""Bytes of a number in the copy of the encoder that proposes features; float32 needs none."""
_DENSE_COPIES = 6
"""Tensors [batch, d_sae] that an SAE which pays for firing holds between forward and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One SAE: its settings, and the widths of what it reads and writes."""

    settings: SaeSettings
    d_in: int
    d_out: int

    @property
    def weights(self) -> int:
        """Numbers in its weights."""
        return self.settings.d_sae * (self.d_in + self.d_out + 1) + self.d_out

    def training_bytes(self, mesh: Mesh = ALONE) -> int:
        """Weights, gradients, two moments, the rough copy of the encoder, and what one step holds besides: what of it
        one of several processes has."""
        settings = self.settings
        rough = _ROUGH[settings.precision] * settings.d_sae * self.d_in
        batch = settings.batch // mesh.data
        if settings.is_selecting:
            held = _PRE_ACTIVATION_COPIES * _PRE_ACTIVATION_ROWS * settings.d_sae
        else:
            held = _DENSE_COPIES * batch * settings.d_sae
        tokens = 4 * batch * (self.d_in + self.d_out)
        return (4 * _FLOAT * self.weights + rough + _FLOAT * held) // mesh.shards + _FLOAT * tokens

    def checkpoint_bytes(self) -> int:
        """Weights and moments, and a clock for each feature."""
        return _FLOAT * (3 * self.weights + 2 * self.settings.d_sae)

    def export_bytes(self) -> int:
        """Its files."""
        return _FLOAT * self.weights


def check_memory(sizes: Mapping[str, Size], stream_bytes: int, device: torch.device, mesh: Mesh = ALONE) -> None:
    """The model is loaded by now, and so no longer part of what is available.

    Args:
        device: where the SAEs learn and the buffer is.
        mesh: of the processes that each have them, those of this machine in one memory unless it is a GPU's.

    Raises:
        BadConfig: more is needed than there is, with the numbers.
    """
    there = free_bytes(device)
    mesh.told(None)  # nobody takes memory before all have looked
    sharing = mesh.neighbours if device.type == "cpu" else 1
    needs = {name: sharing * one.training_bytes(mesh) for name, one in sizes.items()}
    # A checkpoint holds a copy of the buffer while it is written; SAEs are copied one by one, after the buffer is gone,
    # but put together before that where they are in parts.
    held = (sharing + 1) * stream_bytes
    if mesh.shards > 1 and device.type == "cpu":
        held += sum(one.checkpoint_bytes() for one in sizes.values())
    needed = sum(needs.values()) + held
    if needed <= there:
        return
    parts = [f"{name} {gib(size)}" for name, size in sorted(needs.items(), key=lambda one: -one[1])[:5]]
    if len(needs) > 5:
        parts.append(f"{len(needs) - 5} more SAEs")
    parts.append(f"the buffer{' and checkpoints' if mesh.shards > 1 else ''} {gib(held)}")
    raise BadConfig(
        f"saes: training would need about {gib(needed)} on {device}, where {gib(there)} are available beside the model"
        f" ({', '.join(parts)}); lower d_sae or expansion, the number of SAEs, or stream.buffer"
    )


def check_disk(sizes: Iterable[Size], stream_bytes: int, keep: int, folder: Path) -> None:
    """Room for the checkpoints that are kept, one more while it is written, and the SAEs; what is there counts as room.

    Raises:
        BadConfig: more is needed than there is, with the numbers.
    """
    sizes = list(sizes)
    one = sum(size.checkpoint_bytes() for size in sizes) + stream_bytes
    needed = (keep + 1) * one + sum(size.export_bytes() for size in sizes)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free + held:
        raise BadConfig(
            f"run.out: {keep + 1} checkpoints of {gib(one)} and the SAEs need {gib(needed)}, and {folder} has"
            f" {gib(free)} free; lower run.keep, stream.buffer or the SAEs' d_sae, or name another disk"
        )


def gib(size: int) -> str:
    """For messages."""
    return f"{size / 2**30:,.2f} GiB"


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(one for one in (folder, *folder.parents) if one.exists())


_REHEARSED = 16
"""Features of the SAE that stands in for one before it is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaePlan:
    """One SAE that is to be trained."""

    name: str
    reads: Site
    writes: Site | None
    """Of a transcoder."""
    size: Size

    @property
    def settings(self) -> SaeSettings:
        """What its learner is made from."""
        return self.size.settings


def plans(config: RunConfig, widths: Mapping[Site, int], mesh: Mesh = ALONE) -> tuple[SaePlan, ...]:
    """Every SAE of the configuration.

    Raises:
        BadConfig: settings that do not fit the widths, or the processes that share the work; named.
    """
    found = []
    for entry in config.saes:
        d_in = widths[entry.reads]
        d_out = d_in if entry.writes is None else widths[entry.writes]
        try:
            settings = entry.sized(d_in, config.steps, config.stream.batch)
            check_parts(settings, mesh)
        except ValueError as err:
            raise BadConfig(f"saes.{entry.name}: {err}") from err
        size = Size(settings=settings, d_in=d_in, d_out=d_out)
        found.append(SaePlan(name=entry.name, reads=entry.reads, writes=entry.writes, size=size))
    return tuple(found)


def rehearse_export(plan: SaePlan, sample: Mapping[Site, Tensor], model_name: str) -> None:
    """Writes a small untrained SAE of the same kind, so that what the format cannot hold shows before work is done.

    Args:
        sample: activations [tokens, width] at its sites.

    Raises:
        BadConfig: the format has no way to say it.
    """
    small = replace(plan.settings, d_sae=_REHEARSED, k=min(plan.settings.k, 1), widths=(), steps=1, kernels="torch")
    wanted = None if plan.writes is None else sample[plan.writes]
    with TemporaryDirectory() as folder:
        try:
            dictionary = make_learner(small, sample[plan.reads], wanted).export()
            writes = () if plan.writes is None else (plan.writes,)
            saelens_save.save_saelens(dictionary, Path(folder), site=plan.reads, model_name=model_name, writes=writes)
        except ValueError as err:
            raise BadConfig(f"saes.{plan.name}: its SAE could not be written: {err}") from err


# The stream of a run, its batches where the SAEs learn.


class Source:
    """Cached activations lie in the machine's memory, whatever the device; what a model makes is where the model is.

    Raises:
        TrainError: a site that the model or the cache lacks, wrong data.
    """

    def __init__(self, config: RunConfig, model: LanguageModel | None, mesh: Mesh = ALONE) -> None:
        sites = [site for one in config.saes for site in one.sites]
        self._stream = ActivationStream(model, list(dict.fromkeys(sites)), config.training_data, config.stream, mesh)
        self.device = torch.device("cpu") if model is None else model.device
        self.model_name = self._stream.model_name
        self.widths = self._stream.widths
        self.context = None if model is None else context_length(model, config.stream)
        """Tokens that the model reads at once; None where activations are cached."""
        self.has_bos = model is not None and model.tokenizer.bos_token_id is not None
        self.buffer_bytes = buffer_bytes(self.widths, config.stream.buffer, self._stream.dtype)

    @property
    def epoch(self) -> int:
        """How often the data was started again."""
        return self._stream.epoch

    def sample(self, tokens: int) -> dict[Site, Tensor]:
        """The first tokens, without taking them: at each site float32 [tokens, width]."""
        return self._here(self._stream.sample(tokens))

    def batch(self) -> dict[Site, Tensor]:
        """The next batch: at each site float32 [batch, width]."""
        return self._here(self._stream.batch())

    def state(self) -> dict[str, Any]:
        """All that decides the batches to come."""
        return self._stream.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken."""
        self._stream.resume(state)

    def _here(self, tokens: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        return {site: x.to(self.device) for site, x in tokens.items()}
