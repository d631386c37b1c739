"""How much memory KV may take, and what running out of memory looks like."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from saeguard_server.engine.model_files import ModelLoadError
from saeguard_server.engine.stock.model import LoadedModel
from saeguard_server.engine.transformers.attention import KvShape
from saeguard_server.engine.transformers.blocks import BLOCK, blocks_for

SHARE = 0.5
"""Of the memory that is free at start, what KV takes at most where the settings do not say."""
_CGROUP, _PROC = Path("/sys/fs/cgroup"), Path("/proc/meminfo")
_MIB = 2**20


def kv_blocks(model: LoadedModel, slots: int, limit_mb: int | None) -> int:
    """Blocks of KV memory: enough for every slot's longest request, unless memory or the settings allow less.

    Args:
        limit_mb: what the settings allow, in MiB.

    Raises:
        ModelLoadError: that would not hold one short request.
    """
    block_bytes = KvShape.of(model.network.config).token_bytes(model.network.dtype) * BLOCK
    allowed = limit_mb * _MIB if limit_mb is not None else int(free_bytes(model.device) * SHARE)
    count = min(slots * blocks_for(model.info.max_context), allowed // block_bytes)
    if count < 2:
        raise ModelLoadError(
            f"KV memory for {BLOCK} tokens is {block_bytes / _MIB:.1f} MiB, and {allowed / _MIB:.0f} MiB are allowed; "
            "give engine.kv_cache_mb or free memory"
        )
    return count


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken there; on the CPU, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    machine = _field(_PROC, "MemAvailable:") * 1024 or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return machine
    # Cached files count as used, and are given back when asked for.
    return min(machine, max(limit - used + _field(_CGROUP / "memory.stat", "inactive_file"), 0))


def is_out_of_memory(err: Exception) -> bool:
    """Whether a step failed for want of memory alone, so that less work would have gone through."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator has no exception of its own.
    return isinstance(err, RuntimeError) and "can't allocate memory" in str(err)


def _number(path: Path) -> int | None:
    """What a cgroup file says; None where there is no such file or no limit."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int:
    """The number after a name in a kernel's table; 0 where there is none."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
