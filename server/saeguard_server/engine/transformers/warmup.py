"""Compiles before anybody waits for it: passes of every kind that a compiled model tells apart, in nobody's memory."""

from __future__ import annotations

import logging
import time

import torch

from saeguard_sae.edit_table import Group, Rows, RowSpan
from saeguard_server.engine.transformers.attention import Reading
from saeguard_server.engine.transformers.batch import Pass
from saeguard_server.engine.transformers.blocks import BLOCK
from saeguard_server.engine.transformers.network import Network

_log = logging.getLogger(__name__)

_KINDS = (
    # Sizes that differ all come first: what is equal in the first pass would be taken to be equal always.
    ("prompts among running requests", 3, 7, 2),
    ("one running request", 1, 0, 1),
    ("running requests", 4, 0, 3),
    ("prompts", 0, 9, 1),
)


@torch.inference_mode()
def warm_up(network: Network) -> None:
    """Runs the passes and logs how long each took, compiling included. Memory block 0 is all zeros again after it."""
    for name, running, prompt, blocks in _KINDS:
        started = time.monotonic()
        network.forward(_idle(network.device, running, prompt, blocks))
        _log.info("warmed up", extra={"fields": {"for": name, "seconds": round(time.monotonic() - started, 1)}})
    for memory in (*network.attention.keys, *network.attention.values):
        memory[:BLOCK] = 0


def _idle(device: torch.device, running: int, prompt: int, blocks: int) -> Pass:
    """A pass of so many running requests and one prompt of so many tokens, all in block 0; nobody is steered."""
    count = running + prompt
    at = torch.arange(count, device=device) % BLOCK
    special = torch.zeros(count, dtype=torch.bool, device=device)
    spans = (RowSpan(running, running, prompt),) if prompt else ()
    groups = Rows.of(spans, at, special).groups
    if running:
        groups = (Group.singles(tuple(range(running)), at, special), *groups)
    where = torch.arange(BLOCK, device=device).repeat(blocks)
    return Pass(
        ids=torch.zeros(1, count, dtype=torch.int64, device=device),
        positions=at[None],
        write=at,
        spans=spans,
        rows=Rows(groups),
        readings=tuple(Reading(group, where.repeat(len(group.slots), 1)) for group in groups),
        keep=torch.arange(running + bool(prompt), device=device),
    )
