"""What one step's edits cost, alone: 32 requests with 8 edits each, in dictionaries of different sizes.

On one thread: what is compared is work and memory, and a busy machine holds up several threads for milliseconds.
"""

from __future__ import annotations

import asyncio
import time

import torch

from bench.work import EDITS_EACH
from bench.worker import serve
from bench.world import WIDTH
from saeguard_sae.dictionary import Dictionary, JumpReLU
from saeguard_sae.edit_table import FOREVER, EditColumn, EditTable
from saeguard_sae.edits import Affine
from saeguard_sae.rows import Group, Rows
from support.saes import plain_sae

SLOTS = 32
REPEATS = 200
_tables: dict[int, EditTable] = {}


@torch.inference_mode()
def cost(d_sae: int) -> float:
    """Seconds of editing one token of each of 32 requests."""
    if d_sae not in _tables:
        _tables[d_sae] = _table(d_sae)
    table = _tables[d_sae]
    x = torch.randn(SLOTS, WIDTH)
    zeros = torch.zeros(SLOTS, dtype=torch.int64)
    rows = Rows((Group.singles(tuple(range(SLOTS)), zeros, zeros.bool()),))
    start = time.perf_counter()
    for _ in range(REPEATS):
        table.apply(x, rows)
    return (time.perf_counter() - start) / REPEATS


def _table(d_sae: int) -> EditTable:
    w = plain_sae("jumprelu", WIDTH, d_sae, seed=5).weights
    dictionary = Dictionary(w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], JumpReLU(w["threshold"]))
    table = EditTable(SLOTS, WIDTH)
    spread = d_sae // (SLOTS * EDITS_EACH)
    for slot in range(SLOTS):
        features = [(slot * EDITS_EACH + j) * spread for j in range(EDITS_EACH)]
        table.write(slot, [EditColumn(dictionary, one, Affine(alpha=0.0, beta=2.0), 0, FOREVER) for one in features])
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(serve({"cost": cost}))
