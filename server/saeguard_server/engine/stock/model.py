"""From a path to a model that can be served: weights in safetensors, a fast tokenizer, a known architecture."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from saeguard_server.engine.model_files import ModelLoadError, open_files
from saeguard_server.engine.protocol import ModelInfo
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.settings import ModelSettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# SDPA leaves out the soft-capping of attention scores.
_EAGER = ("gemma2",)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A Hugging Face causal language model with its tokenizer."""

    network: Any
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    info: ModelInfo
    device: torch.device


def load_model(settings: ModelSettings, max_context: int) -> LoadedModel:
    """Loads the model that the settings name.

    Args:
        max_context: of the engine; the model's own limit holds where it is smaller.

    Raises:
        ModelLoadError: no such model, an unknown architecture, no fast tokenizer, weights not in safetensors.
    """
    files = open_files(settings, max_context)
    try:
        network = _network(files.path, files.config, settings)
    except (ValueError, OSError, RuntimeError, SafetensorError) as err:
        raise ModelLoadError(f"model {settings.path!r}: {err}") from err
    return LoadedModel(network, files.tokenizer, files.eos_ids, files.info, torch.device(settings.device))


def _network(path: Path, config: Any, settings: ModelSettings) -> nn.Module:
    if settings.dtype not in _DTYPES:
        raise ValueError(f"model.dtype: must be one of {', '.join(_DTYPES)}, got {settings.dtype!r}")
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]  # it would break up the log
    attention = "eager" if config.model_type in _EAGER else "sdpa"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=_DTYPES[settings.dtype],
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, by name
    )
    network: nn.Module = loaded[0]
    _check_complete(loaded[1])
    return network.to(settings.device).eval().requires_grad_(False)


def _check_complete(report: Mapping[str, Any]) -> None:
    """transformers fills in what the files lack with random numbers, and says so in the log only."""
    for name, what in (
        ("missing_keys", "its files lack weights that the architecture has"),
        ("mismatched_keys", "weights in its files have another shape than its config.json says"),
        ("error_msgs", "its files cannot be read whole"),
    ):
        if found := sorted(map(str, report.get(name) or ())):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(f"{what}: {', '.join(found[:3])}{more}")
