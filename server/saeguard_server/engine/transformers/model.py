"""From a path to a model that can be served: weights in safetensors, a fast tokenizer, a known architecture."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from saeguard_sae.architectures import layout
from saeguard_sae.loading import digest
from saeguard_server.engine.protocol import ModelInfo
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.settings import ModelSettings

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# SDPA leaves out the soft-capping of attention scores.
_EAGER = ("gemma2",)


class ModelLoadError(ValueError):
    """A model that cannot be served; the message says what would help."""


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
    try:
        path = _resolve(settings)
        files = tuple(sorted(file for pattern in _FILES for file in path.glob(pattern)))
        found = digest(files)
        _check_digest(settings.digest, found)
        config: Any = AutoConfig.from_pretrained(path)
        layout(config.model_type)
        network = _network(path, config, settings)
        tokenizer = _tokenizer(path, config)
    except (ValueError, OSError, RuntimeError, SafetensorError) as err:
        raise ModelLoadError(f"model {settings.path!r}: {err}") from err
    info = ModelInfo(
        name=settings.name or Path(settings.path).name,
        architecture=config.model_type,
        digest=found,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=min(max_context, config.max_position_embeddings),
        dtype=settings.dtype,
        has_chat_template=tokenizer.has_chat_template,
    )
    return LoadedModel(network, tokenizer, _eos_ids(network), info, torch.device(settings.device))


def _resolve(settings: ModelSettings) -> Path:
    local = Path(settings.path)
    if local.is_dir():
        return local
    return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=list(_FILES)))


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


def _check_digest(wanted: str | None, found: str) -> None:
    if wanted is not None and wanted != found:
        raise ValueError(f"model.digest: its files have {found}, the settings ask for {wanted}")


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


def _tokenizer(path: Path, config: Any) -> Tokenizer:
    fast = AutoTokenizer.from_pretrained(path)
    if not isinstance(fast, PreTrainedTokenizerFast):
        raise ValueError("its tokenizer has no fast version (tokenizer.json); convert it with transformers")
    return Tokenizer(fast, config.vocab_size)


def _eos_ids(network: Any) -> frozenset[int]:
    found = network.generation_config.eos_token_id
    if found is None:
        found = network.config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])
