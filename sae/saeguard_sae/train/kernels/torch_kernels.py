"""The kernels in torch: for every device, and what the compiled ones are compared with."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from saeguard_sae.train.kernels.compiled import (
    CompiledKernels,
    Decoded,
    FeatureRows,
    Kernels,
    Pairs,
    Rates,
    Rough,
    starts,
)
from saeguard_sae.train.parallel import ALONE, Mesh
from saeguard_sae.train.settings import Kernels as Choice

_PAIRS = 1 << 16
"""Pairs whose rows are gathered at once."""


class TorchKernels:
    """See ``Kernels``."""

    name = "torch"

    def __init__(self, mesh: Mesh = ALONE) -> None:
        """``mesh``: where the features of a reconstruction lie in several processes."""
        self._mesh = mesh

    def above(self, x: Tensor, W: Rough, bias: Tensor, cut: float) -> Pairs:
        """See ``Kernels.above``."""
        return Pairs.join([_where(pre.wide() > cut) for pre in W.products(x, bias)])

    def largest(self, x: Tensor, W: Rough, bias: Tensor, k: int) -> tuple[Pairs, Tensor]:
        """See ``Kernels.largest``."""
        found, values = [], []
        for pre in W.products(x, bias):
            wide = pre.wide()
            best, index = wide.sort(dim=1, descending=True, stable=True)
            mask = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, index[:, :k], best[:, :k] > 0)
            found.append(_where(mask))
            values.append(wide[mask].float())
        return Pairs.join(found), torch.cat(values)

    def strongest(self, pairs: Pairs, values: Tensor, k: int) -> Tensor:
        """See ``Kernels.strongest``."""
        row = pairs.rows()
        by_value = values.argsort(descending=True, stable=True)
        order = by_value[row[by_value].argsort(stable=True)]
        rank = torch.arange(len(values), device=values.device) - pairs.starts[row]
        return torch.empty_like(row, dtype=torch.bool).scatter_(0, order, rank < k)

    def read(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: Pairs) -> Tensor:
        """See ``Kernels.read``."""
        return (_dots(x, W_enc, pairs.rows(), pairs.feature.long()) + b_enc[pairs.feature]).relu()

    def decode(
        self, target: Tensor, W_dec: Tensor, pairs: Pairs, values: Tensor, ends: Tensor, weights: Tensor
    ) -> Decoded:
        """See ``Kernels.decode``."""
        rows, feature = pairs.rows(), pairs.feature.long()
        level = torch.bucketize(pairs.feature, ends, right=True)
        first = -target if self._mesh.shard == 0 else torch.zeros_like(target)
        errors = torch.stack([first] + [torch.zeros_like(target) for _ in range(len(ends) - 1)])
        flat = errors.view(-1, target.shape[1])
        for part in _parts(len(values)):
            flat.index_add_(0, level[part] * len(target) + rows[part], values[part, None] * W_dec[feature[part]])
        errors = self._mesh.sum_features(errors).cumsum(0)
        pulls = (errors * weights[:, None, None]).flip(0).cumsum(0).flip(0)
        slopes = _dots(pulls.view(-1, target.shape[1]), W_dec, level * len(target) + rows, feature)
        return Decoded(pulls, errors[-1], errors.square().sum(-1).T, slopes * (values > 0))

    def gradients(
        self, x: Tensor, decoded: Decoded, pairs: Pairs, values: Tensor, ends: Tensor, rows: FeatureRows
    ) -> None:
        """See ``Kernels.gradients``."""
        fires = values > 0
        token, feature = pairs.rows()[fires], pairs.feature.long()[fires]
        values, slopes = values[fires], decoded.slopes[fires]
        touched = torch.zeros_like(rows.active).index_fill_(0, feature, 1)
        fresh = (touched.bool() & ~rows.active.bool()).nonzero().flatten()
        for tensor in (rows.g_enc, rows.g_bias, rows.g_dec):
            tensor.index_fill_(0, fresh, 0.0)
        level = torch.bucketize(feature.int(), ends, right=True)
        pulls = decoded.pulls.view(-1, decoded.pulls.shape[-1])
        for part in _parts(len(values)):
            pulled = pulls[level[part] * len(x) + token[part]]
            rows.g_dec.index_add_(0, feature[part], values[part, None] * pulled)
            rows.g_enc.index_add_(0, feature[part], slopes[part, None] * x[token[part]])
        rows.g_bias.index_add_(0, feature, slopes)
        rows.active.bitwise_or_(touched)

    def lengths(self, rows: FeatureRows) -> Tensor:
        """See ``Kernels.lengths``."""
        along = (rows.g_dec * rows.W_dec).sum(1)
        dec = (rows.g_dec.square().sum(1) - along.square()).relu()
        return torch.where(rows.active.bool(), rows.g_enc.square().sum(1) + rows.g_bias.square() + dec, 0.0)

    def adam(self, rows: FeatureRows, rates: Rates) -> None:
        """See ``Kernels.adam``."""
        at = rows.active.nonzero().flatten()
        rows.active.zero_()
        rows.clock[at] += 1
        clock = rows.clock[at].double()
        step = (rates.rate / (1 - rates.beta1**clock)).float()
        root = (1 / (1 - rates.beta2**clock).sqrt()).float()

        def move(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor) -> Tensor:
            wide = (slice(None), None) if weight.ndim == 2 else (slice(None),)
            first = rates.beta1 * m[at] + (1 - rates.beta1) * gradient
            second = rates.beta2 * v[at] + (1 - rates.beta2) * gradient.square()
            m[at], v[at] = first, second
            return weight[at] - step[wide] * first / (second.sqrt() * root[wide] + rates.eps)

        g_dec, unit = rows.g_dec[at], rows.W_dec[at]
        g_dec = (g_dec - (g_dec * unit).sum(1, keepdim=True) * unit) * rates.scale
        rows.W_enc[at] = move(rows.W_enc, rows.g_enc[at] * rates.scale, rows.m_enc, rows.v_enc)
        rows.b_enc[at] = move(rows.b_enc, rows.g_bias[at] * rates.scale, rows.m_bias, rows.v_bias)
        moved = move(rows.W_dec, g_dec, rows.m_dec, rows.v_dec)
        rows.W_dec[at] = moved / moved.norm(dim=1, keepdim=True)
        rows.rough.write(at, rows.W_enc[at])


def _where(mask: Tensor) -> Pairs:
    """Those where ``mask`` [B, F] is True."""
    return Pairs(starts(mask.sum(1)), mask.nonzero()[:, 1].int())


def _dots(x: Tensor, W: Tensor, rows: Tensor, feature: Tensor) -> Tensor:
    """[n] products of rows of x and of W."""
    found = [(x[rows[part]] * W[feature[part]]).sum(1) for part in _parts(len(rows))]
    return torch.cat([x.new_zeros(0), *found])


def _parts(count: int) -> Iterator[slice]:
    """Few enough pairs at once that their gathered rows fit in memory."""
    return (slice(start, start + _PAIRS) for start in range(0, count, _PAIRS))


# Which kernels a run gets, and compiling them.


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
