"""Reads the files that formats are made of; nothing here ever runs code from a file.

Every error names the file and is a ``ValueError``.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What numpy and zipfile raise over a damaged archive; a damaged header can also ask for more memory than there is.
_BAD_ARCHIVE = (
    ValueError, OSError, EOFError, TypeError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
    struct.error,
)  # fmt: skip


class Tensors:
    """The tensors of one file, by name, taken out one by one; ``close`` refuses what nobody took.

    Values are float32; those already stored so are views of the mapped file where the file can be mapped.
    """

    def __init__(self, file: Path, names: Iterable[str], get: Any) -> None:
        self.file, self._left, self._get = file, set(names), get
        self.names = frozenset(self._left)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def take(self, name: str, *, keep_dtype: bool = False) -> Tensor:
        """The tensor, in float32 unless ``keep_dtype``.

        Raises:
            ValueError: it is not there, or not floating point.
        """
        if name not in self.names:
            there = ", ".join(sorted(self.names)) or "nothing"
            raise ValueError(f"{self.file.name}: no {name}; it holds {there}")
        self._left.discard(name)
        found = self._get(name)
        if not isinstance(found, Tensor):
            raise ValueError(f"{self.file.name}: {name} is not a tensor")
        found = found.detach()
        if keep_dtype:
            return found
        if found.dtype not in _FLOATS:
            raise ValueError(f"{self.file.name}: {name} is {found.dtype}, not a float")
        if found.ndim < 2 and not torch.isfinite(found).all():
            # Matrices are looked at once they are a dictionary; what a loader takes the exponential of is seen here.
            raise ValueError(f"{self.file.name}: {name} holds values that are not finite")
        return found.float()

    def take_if(self, name: str) -> Tensor | None:
        """The tensor, or None where the file has none of that name."""
        return self.take(name) if name in self.names else None

    def scalar(self, name: str) -> float:
        """A tensor of one element.

        Raises:
            ValueError: it is not there or has more.
        """
        found = self.take(name, keep_dtype=True)
        if found.numel() != 1:
            raise ValueError(f"{self.file.name}: {name} must hold one number, has shape {tuple(found.shape)}")
        return float(found)

    def ignore(self, *names: str) -> None:
        """Names that are known to make no difference."""
        self._left -= set(names)

    def close(self) -> None:
        """Says that everything was taken.

        Raises:
            ValueError: a tensor is left whose meaning is not known.
        """
        if self._left:
            raise ValueError(f"{self.file.name}: unexpected {sorted(self._left)[0]!r}: what it changes is not known")


def safetensors(file: Path) -> Tensors:
    """A safetensors file. Each tensor is mapped by itself, so that one that was copied does not stay in memory."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file.name}: {err}") from err

    def get(name: str) -> Tensor:
        try:
            with safe_open(file, framework="pt") as opened:
                found: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise ValueError(f"{file.name}: {err}") from err
        return found

    return Tensors(file, names, get)


def npz(file: Path) -> Tensors:
    """A numpy archive, without pickles. Each array is read by itself, so that one that was copied does not stay."""

    def read(name: str | None) -> Any:
        try:
            # Opened here: numpy leaves a file open that turns out to be damaged.
            with file.open("rb") as stream, np.lib.npyio.NpzFile(stream, allow_pickle=False) as archive:
                return list(archive.files) if name is None else torch.from_numpy(archive[name])
        except _BAD_ARCHIVE as err:
            raise ValueError(f"{file.name}: {err}") from err

    return Tensors(file, read(None), read)


def checkpoint(file: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, as long as that is tensors and plain values.

    Raises:
        ValueError: it needs more than that (such a file could run any code), or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a plain pickle's version before it refuses the pickle
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as err:
        raise ValueError(
            f"{file.name}: holds Python objects besides tensors, which could run any code, and is not read. Where you "
            "trust it, load it with torch.load(weights_only=False) and save its state dict alone with torch.save"
        ) from err
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
        raise ValueError(f"{file.name}: not a readable torch file: {err}") from err
    if not isinstance(found, dict):
        raise ValueError(f"{file.name}: holds a {type(found).__name__}, not a state dict")
    return found


def state_dict(file: Path) -> Tensors:
    """A state dict that ``torch.save`` wrote."""
    found = checkpoint(file)
    return Tensors(file, (str(name) for name in found), found.__getitem__)


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """What a torch file holds, by name: a tensor's shape, () for anything else; empty where it cannot be read.

    For telling formats apart that have nothing else to go by; loading the file says what is wrong with it.
    """
    if file.suffix not in (".pt", ".pth") or not file.is_file():
        return {}
    try:
        found = checkpoint(file)
    except ValueError:
        return {}
    return {str(name): tuple(one.shape) if isinstance(one, Tensor) else () for name, one in found.items()}


def json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as err:
        raise ValueError(f"{file.name}: not JSON: {err}") from err
    return _table(found, file)


def yaml_object(file: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping; tags that build Python objects are refused."""
    try:
        found = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as err:
        raise ValueError(f"{file.name}: not YAML: {err}") from err
    return _table(found, file)


def check_keys(config: Mapping[str, Any], known: Iterable[str], file: str) -> None:
    """Refuses keys that nobody here knows: they may change what the weights mean.

    Raises:
        ValueError: names the first.
    """
    unknown = sorted(str(key) for key in config.keys() - set(known))
    if unknown:
        raise ValueError(f"{file}: unknown key {unknown[0]!r}: what it changes is not known")


def check_size(config: Mapping[str, Any], key: str, size: int, file: str) -> None:
    """Compares a size that a file states with the weights' own.

    Raises:
        ValueError: they differ.
    """
    if key in config and config[key] is not None and config[key] != size:
        raise ValueError(f"{file}: {key} is {config[key]}, but the weights have {size}")


def check_shapes(shapes: Mapping[str, tuple[Tensor, tuple[int, ...]]], file: str) -> None:
    """Compares tensors, by their names in the file, with the shapes that they must have.

    Raises:
        ValueError: names the first that differs.
    """
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def number(config: Mapping[str, Any], key: str, file: str) -> float:
    """A finite number.

    Raises:
        ValueError: it is missing or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise ValueError(f"{file}: {key} must be a number, got {value!r}")
    return float(value)


def whole(config: Mapping[str, Any], key: str, file: str) -> int:
    """A whole number above zero.

    Raises:
        ValueError: it is missing or something else.
    """
    value = number(config, key, file)
    if value < 1 or value != int(value):
        raise ValueError(f"{file}: {key} must be a whole number above 0, got {config[key]!r}")
    return int(value)


def flag(config: Mapping[str, Any], key: str, default: bool | None, file: str) -> bool:
    """True or false; None as ``default`` means that it must be there.

    Raises:
        ValueError: it is missing or something else.
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {key} must be true or false, got {value!r}")
    return value


def choice(config: Mapping[str, Any], key: str, allowed: Iterable[str], file: str) -> str:
    """One of these words.

    Raises:
        ValueError: it is missing or something else.
    """
    value, words = config.get(key), list(allowed)
    if value not in words:
        raise ValueError(f"{file}: {key} {value!r} is not supported; supported are {', '.join(words)}")
    return str(value)


def text(config: Mapping[str, Any], key: str, file: str) -> str:
    """A piece of text that is not empty.

    Raises:
        ValueError: it is missing or something else.
    """
    value = config.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{file}: {key} must be text, got {value!r}")
    return value


def _table(found: Any, file: Path) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{file.name}: must hold a table of keys, holds a {type(found).__name__}")
    return found
