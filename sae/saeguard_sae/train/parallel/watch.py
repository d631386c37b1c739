"""Notices at once that another process of the run is gone, whatever this one waits for: NCCL would wait for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from saeguard_sae.train.parallel.voice import Voice

GRACE_S = 10.0
"""For this process to end by itself once another is gone."""
_LONG = timedelta(days=365)
_TAG = 7
_DONE, _LOST = 1.0, 2.0


class Watch:
    """Each process waits on a connection of its own for a word of the next one: that it is done, or has lost another.

    So that all know at once, and have ended ``GRACE_S`` later, also those that wait for a GPU.
    """

    def __init__(self, kept: Callable[[], str]) -> None:
        """``kept``: what there is to go on from, for the message."""
        self._kept, self._voice = kept, Voice()
        self._group = dist.new_group(backend="gloo", timeout=_LONG)
        self._next = (dist.get_rank() + 1) % dist.get_world_size()
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This process is done; waits until the next one is."""
        self._tell(_DONE)
        self._thread.join()

    def _listen(self) -> None:
        word = torch.zeros(1)
        with suppress(RuntimeError):
            dist.recv(word, self._next, group=self._group, tag=_TAG)
        if float(word) == _DONE:
            return
        if self._voice.may_break_the_silence():
            sys.stderr.write(
                f"saeguard train: process {self._next} of {dist.get_world_size()} (counted from 0) is gone without a"
                f" word: killed, out of memory, or its machine is lost; {self._kept()}; start the same command with"
                " --resume\n"
            )
            sys.stderr.flush()
        with suppress(RuntimeError):
            self._tell(_LOST)
        time.sleep(GRACE_S)
        os._exit(1)

    def _tell(self, word: float) -> None:
        before = (dist.get_rank() - 1) % dist.get_world_size()
        dist.send(torch.tensor([word]), before, group=self._group, tag=_TAG)
