"""The language model whose activations are learned: any Hugging Face causal model whose sites are known."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from saeguard_sae.models import layout
from saeguard_sae.train.settings import TrainError, check_choice, one_line

Dtype: TypeAlias = Literal["float32", "bfloat16"]

# Its attention caps logits, which the fused kernel leaves out without a word.
_EAGER = ("gemma2",)


class LanguageModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which language model is read.

    Raises:
        TrainError: names the field and what is allowed.
    """

    path: str
    """A local folder or a Hugging Face repository."""
    revision: str = ""
    """Commit or tag of a Hugging Face repository."""
    name: str = ""
    """What the SAE's files say it belongs to; empty: the last part of the path."""
    dtype: Dtype = "float32"
    """How it computes."""
    device: str = "cpu"
    """A torch device such as cpu or cuda:0."""

    def __post_init__(self) -> None:
        if not self.path:
            raise TrainError("model.path: must name a folder or a Hugging Face repository, got nothing")
        check_choice("model.dtype", self.dtype, get_args(Dtype))


@dataclass(frozen=True, slots=True, eq=False)
class LanguageModel:
    """A model that is loaded, for reading only."""

    network: Any
    """A Hugging Face causal language model, in evaluation mode, without gradients."""
    tokenizer: PreTrainedTokenizerFast
    config: Any
    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def max_context(self) -> int:
        """Tokens that it can read at once."""
        return int(self.config.max_position_embeddings)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        return frozenset(map(int, self.tokenizer.all_special_ids))


def open_model(settings: LanguageModelSettings) -> LanguageModel:
    """Loads a model and its tokenizer, from the hub where the path is no local folder.

    Raises:
        TrainError: no such device or model, an architecture whose sites are not known, incomplete weights, no fast
            tokenizer.
    """
    _check_device(settings.device)
    where: dict[str, Any] = {"revision": settings.revision or None}
    path: str | Path = settings.path
    if Path(settings.path).is_dir():
        where, path = {}, Path(settings.path)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", settings.path):
        raise TrainError(f"model.path: there is no folder {settings.path!r}; a Hugging Face repository is owner/name")
    try:
        config: Any = AutoConfig.from_pretrained(path, **where)
        layout(config.model_type)
        tokenizer = _tokenizer(path, where)
        network = _network(path, config, settings, where)
    except (ValueError, OSError, RuntimeError, SafetensorError) as err:
        raise TrainError(f"model.path: {settings.path!r} cannot be used: {one_line(err)}") from err
    name = settings.name or Path(settings.path).resolve().name
    return LanguageModel(
        network, tokenizer, config, name, torch.device(settings.device), getattr(torch, settings.dtype)
    )


def _check_device(device: str) -> None:
    try:
        # A device that the machine lacks parses, and fails at its first tensor.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise TrainError(f"model.device: {device!r} is not a device of this machine: {one_line(err)}") from err


def _tokenizer(path: str | Path, where: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
    except (ValueError, OSError, KeyError, TypeError) as err:
        raise TrainError(f"it has no tokenizer: {one_line(err)}") from err
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TrainError("its tokenizer has no fast version (tokenizer.json); convert it with transformers")
    if not len(tokenizer):
        raise TrainError(
            "it has no tokenizer: there are no tokenizer.json and tokenizer_config.json beside its weights"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _network(path: str | Path, config: Any, settings: LanguageModelSettings, where: Mapping[str, Any]) -> Any:
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]  # it would break up the log
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=getattr(torch, settings.dtype),
        attn_implementation="eager" if config.model_type in _EAGER else "sdpa",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, by name
        **where,
    )
    network, report = loaded
    # transformers fills in what the files lack with random numbers, and says so in the log only.
    for kind, what in (("missing_keys", "lack weights"), ("mismatched_keys", "hold weights of another shape")):
        if wrong := sorted(map(str, report.get(kind) or ())):
            raise TrainError(
                f"its files {what} that the architecture has: {', '.join(wrong[:3])} ({len(wrong)} in all)"
            )
    return network.to(settings.device).eval().requires_grad_(False)
