"""Disks that fail, under the audit alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from saeguard_server.audit import chain

ERRORS = {"write": 28, "fsync": 5, "ftruncate": 30}
"""ENOSPC after a part of the bytes, EIO when all are written, EROFS before any."""


class FailingDisk:
    """Stands for ``os`` where the audit writes; ``failing`` names the calls that fail, "gone" that none works after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing = ""
        self.after: Callable[[], None] = lambda: None
        """Called after each write that was synced."""
        monkeypatch.setattr(chain, "os", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, file: int, data: memoryview) -> int:
        if "write" in self.failing.split():
            os.write(file, data[:20])
            self._fail("write")
        return os.write(file, data)

    def fsync(self, file: int) -> None:
        if "fsync" in self.failing.split():
            self._fail("fsync")
        os.fsync(file)
        self.after()

    def ftruncate(self, file: int, size: int) -> None:
        if "ftruncate" in self.failing.split():
            self._fail("ftruncate")
        os.ftruncate(file, size)

    def _fail(self, call: str) -> None:
        if "gone" in self.failing:
            self.failing += " ftruncate"
        raise OSError(ERRORS[call], os.strerror(ERRORS[call]))
