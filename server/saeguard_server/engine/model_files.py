"""What is known of a model from its files alone, without its weights: the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from saeguard_sae.loading import weights_digest
from saeguard_sae.models import layout
from saeguard_server.engine.protocol import ModelInfo
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.settings import ModelSettings

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


class ModelLoadError(ValueError):
    """A model that cannot be served; the message says what would help."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelFiles:
    """A Hugging Face model in the folder ``path``: its configuration, its tokenizer, and what callers see of it."""

    path: Path
    config: Any
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    info: ModelInfo


def open_files(settings: ModelSettings, max_context: int) -> ModelFiles:
    """The files of the model that the settings name, fetched from the hub where it is no local folder.

    Args:
        max_context: of the engine; the model's own limit holds where it is smaller.

    Raises:
        ModelLoadError: no such model, another digest than the settings ask for, an unknown architecture, no fast
            tokenizer.
    """
    try:
        path = _resolve(settings)
        found = weights_digest(tuple(sorted(file for pattern in _PATTERNS for file in path.glob(pattern))))
        if settings.digest is not None and settings.digest != found:
            raise ValueError(f"model.digest: its files have {found}, the settings ask for {settings.digest}")
        config: Any = AutoConfig.from_pretrained(path)
        layout(config.model_type)
        tokenizer = _tokenizer(path, config)
        eos_ids = _eos_ids(path, config)
    except (ValueError, OSError) as err:
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
    return ModelFiles(path, config, tokenizer, eos_ids, info)


def _resolve(settings: ModelSettings) -> Path:
    local = Path(settings.path)
    if local.is_dir():
        return local
    return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=list(_PATTERNS)))


def _tokenizer(path: Path, config: Any) -> Tokenizer:
    fast = AutoTokenizer.from_pretrained(path)
    if not isinstance(fast, PreTrainedTokenizerFast):
        raise ValueError("its tokenizer has no fast version (tokenizer.json); convert it with transformers")
    return Tokenizer(fast, config.vocab_size)


def _eos_ids(path: Path, config: Any) -> frozenset[int]:
    has_own = (path / "generation_config.json").is_file()
    found = GenerationConfig.from_pretrained(path).eos_token_id if has_own else None
    if found is None:
        found = config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])
