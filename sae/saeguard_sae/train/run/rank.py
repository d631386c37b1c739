"""Which process of a run speaks."""

from __future__ import annotations

import torch.distributed


def is_writer() -> bool:
    """Whether this process writes files and lines: the only one, or the first of those that train together."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
