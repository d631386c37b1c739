"""Writes activations to a folder that a later stream reads: whole, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.cached import Index, Shard
from saeguard_sae.train.errors import TrainError, check_at_least, one_line
from saeguard_sae.train.sources import INDEX
from saeguard_sae.train.stream import ActivationStream

_SHARD_BYTES = 256 * 1024 * 1024


def cache(stream: ActivationStream, folder: Path, tokens: int) -> None:
    """Takes at least ``tokens`` tokens from the stream, in whole batches, and writes them in its dtype.

    They are written as they are drawn: mixed, and without what the stream leaves out.

    Raises:
        TrainError: ``folder`` is there already, or cannot be written (a full disk); what was begun is removed.
    """
    check_at_least("tokens", tokens, 1)
    if folder.exists():
        raise TrainError(f"folder: {str(folder)!r} exists already")
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        index = _write(stream, part, tokens)
        (part / INDEX).write_text(json.dumps(msgspec.to_builtins(index), indent=2) + "\n", encoding="utf-8")
        part.rename(folder)
    except (OSError, SafetensorError) as err:
        raise TrainError(f"folder: {str(folder)!r} cannot be written: {one_line(err)}") from err
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(stream: ActivationStream, folder: Path, tokens: int) -> Index:
    per_token = sum(stream.widths.values()) * stream.dtype.itemsize
    per_shard = max(1, _SHARD_BYTES // (per_token * stream.settings.batch))
    shards: list[Shard] = []
    left = -(-tokens // stream.settings.batch)
    while left > 0:
        batches = [stream.batch() for _ in range(min(left, per_shard))]
        left -= len(batches)
        shards.append(_write_shard(stream, folder / f"{len(shards):05}.safetensors", batches))
    return Index(
        model=stream.model_name,
        dtype="bfloat16" if stream.dtype == torch.bfloat16 else "float32",
        tokens=sum(shard.tokens for shard in shards),
        sites={str(site): width for site, width in stream.widths.items()},
        shards=tuple(shards),
    )


def _write_shard(stream: ActivationStream, path: Path, batches: list[dict[Site, Tensor]]) -> Shard:
    joined = {str(site): torch.cat([one[site] for one in batches]).to("cpu", stream.dtype) for site in stream.sites}
    save_file(joined, path)
    # safetensors lets nobody but the owner read what it writes.
    path.chmod(0o644)
    return Shard(file=path.name, tokens=len(next(iter(joined.values()))))
