"""Which files of a repository make up one SAE, so that nothing else is downloaded."""

from __future__ import annotations

from collections.abc import Set
from difflib import get_close_matches

_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
_SETTINGS = (".json", ".yaml", ".yml")
# Weights by the names that say a folder is one SAE, whatever else lies in it.
_ONE_SAE = (
    "sae_weights.safetensors", "sae.safetensors", "params.safetensors", "params.npz", "ae.pt", "sae.pt",
    "latest_ckpt.safetensors", "checkpoints/final.safetensors",
)  # fmt: skip
# Tensors about an SAE that are none of its weights; the first changes what the weights mean.
_WHITENING, _SPARSITY = "activation_whitening.safetensors", "sparsity.safetensors"


def needed(names: Set[str], inside: str) -> set[str]:
    """Of a repository's files, those that make up the SAE at ``inside``: its weights, and what a format wants beside.

    Raises:
        ValueError: there is none at that place, or several.
    """
    if inside in names:
        return _with_its_own(names, inside)
    folder = f"{inside}/" if inside else ""
    if not any(name.startswith(folder) for name in names):
        raise ValueError(f"there is no such file or folder in the repository{_close_to(inside, names)}")
    weights = [name for name in _weights(names) if name.startswith(folder)]
    found = _one_sae(folder, weights)
    if found is None:
        raise ValueError(f"holds {_counted(folder, weights)}")
    return _with_its_own(names, found) | _settings(names, inside)


def _weights(names: Set[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(_WEIGHTS) and not name.endswith((_WHITENING, _SPARSITY)))


def _one_sae(folder: str, weights: list[str]) -> str | None:
    """The weights of the folder's SAE, if it is the folder of one."""
    for name in _ONE_SAE:
        if f"{folder}{name}" in weights:
            return f"{folder}{name}"
    direct = [name for name in weights if "/" not in name.removeprefix(folder)]
    halves = {_twin(name) for name in direct if _is_half(name, "W_enc_")}
    alone = [name for name in direct if name not in halves]
    return alone[0] if len(alone) == 1 else None


def _with_its_own(names: Set[str], file: str) -> set[str]:
    """A file of weights, the settings beside it, and the other half where there is one."""
    return {file} | _settings(names, file.rpartition("/")[0]) | ({_twin(file)} & names)


def _settings(names: Set[str], folder: str) -> set[str]:
    """What a format may want in that folder besides the weights."""
    here = {name for name in names if name.rpartition("/")[0] == folder}
    return {name for name in here if name.endswith((*_SETTINGS, _WHITENING))}


def _twin(file: str) -> str:
    """The decoder's file of an encoder's, and the other way round, in a cross-layer transcoder; any other, itself."""
    folder, slash, name = file.rpartition("/")
    if _is_half(file, "W_enc_"):
        return f"{folder}{slash}W_dec_{name.removeprefix('W_enc_')}"
    return f"{folder}{slash}W_enc_{name.removeprefix('W_dec_')}" if _is_half(file, "W_dec_") else file


def _is_half(file: str, prefix: str) -> bool:
    return file.rpartition("/")[2].startswith(prefix)


def _counted(folder: str, weights: list[str]) -> str:
    if not weights:
        return "no weights of an SAE"
    direct = [name for name in weights if "/" not in name.removeprefix(folder)]
    places = direct or sorted({name.rpartition("/")[0].removesuffix("/checkpoints") for name in weights})
    kind = "files" if direct else "folders"
    return f"several SAEs: name one of its {len(places)} {kind}, such as {', '.join(places[:3])}"


def _close_to(inside: str, names: Set[str]) -> str:
    weights = _weights(names)
    folders = {name.rpartition("/")[0] for name in weights} - {""}
    close = get_close_matches(inside, sorted(folders) + weights, n=3)
    return f"; close are {', '.join(close)}" if close else ""
