"""Which kernels a run gets, and compiling them."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from saeguard_sae.train.kernels.compiled import CompiledKernels
from saeguard_sae.train.kernels.protocol import Kernels
from saeguard_sae.train.kernels.torch_kernels import TorchKernels
from saeguard_sae.train.settings import Kernels as Choice

_log = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "search.cpp"))
_HEADERS = (Path(__file__).with_name("largest.h"),)
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared"),
)
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_S = 120


class CannotCompile(RuntimeError):
    """No compiler, or it failed; the message says which."""


def choose(choice: Choice, device: torch.device) -> Kernels:
    """The kernels for tensors on that device.

    Raises:
        CannotCompile: ``compiled`` was asked for and cannot be had.
    """
    if choice == "torch" or (choice == "auto" and device.type != "cpu"):
        return TorchKernels()
    if device.type != "cpu":
        raise CannotCompile(f"kernels: compiled ones are for the CPU, not for {device.type}; use torch or auto")
    try:
        return _compiled()
    except CannotCompile as err:
        if choice == "compiled":
            raise
        _log.warning("training without compiled kernels, which is slower: %s", err)
        return TorchKernels()


@cache
def _compiled() -> CompiledKernels:
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise CannotCompile(f"kernels: no C++ compiler among {', '.join(_COMPILERS)}; install one")
    command = [compiler, *_FLAGS, *map(str, _SOURCES), *map(str, _openmp())]
    kept = _folder() / f"{_key(command)}.so"
    if not kept.exists():
        _compile(command, kept)
    try:
        return CompiledKernels(kept)
    except OSError as err:
        raise CannotCompile(f"kernels: {kept} cannot be loaded: {err}") from err


def _compile(command: list[str], kept: Path) -> None:
    """Into a new file, then moved: two processes may do so at the same time."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / kept.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=_COMPILE_S)
            if done.returncode:
                raise CannotCompile(f"kernels: {command[0]} failed: {done.stderr.strip()[-500:]}")
            os.replace(made, kept)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise CannotCompile(f"kernels: {command[0]}: {err}") from err


def _openmp() -> list[Path]:
    """torch's own OpenMP library: beside a second one, each would put its threads to sleep between two loops."""
    base = Path(torch.__file__).parent
    return sorted([*base.glob("lib/libgomp*"), *base.parent.glob("torch.libs/libgomp*")])[:1]


def _folder() -> Path:
    """Beside what torch keeps for this user, in a folder that the user may move (``TORCH_HOME``)."""
    return Path(torch.hub.get_dir()).parent / "saeguard"


def _key(command: list[str]) -> str:
    """By the sources, the command, and the processor, whose instructions the result may use."""
    about = Path("/proc/cpuinfo")
    flags = (
        next((line for line in about.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        if (about.exists())
        else platform.processor()
    )
    parts = (*(one.read_text(encoding="utf-8") for one in _SOURCES + _HEADERS), *command, platform.machine(), flags)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
