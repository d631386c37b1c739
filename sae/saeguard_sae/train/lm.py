"""The language model whose activations are learned: any Hugging Face causal model whose sites are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import torch
from transformers import PreTrainedTokenizerFast

from saeguard_sae.models import ModelLoadError, open_folder, open_model, torch_dtype
from saeguard_sae.train.settings import TrainError, check_choice, one_line

Dtype: TypeAlias = Literal["float32", "bfloat16"]


class LanguageModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which language model is read."""

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
        return int(self.config.max_position_embeddings)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        return frozenset(map(int, self.tokenizer.all_special_ids))


def open_language_model(settings: LanguageModelSettings) -> LanguageModel:
    """Loads a model and its tokenizer, from the hub where the path is no local folder.

    Raises:
        TrainError: no such device or model, an architecture whose sites are not known, incomplete weights, no fast
            tokenizer.
    """
    try:
        folder = open_folder(settings.path, settings.revision)
        network = open_model(folder, settings.dtype, settings.device)
    except ModelLoadError as err:
        raise TrainError(one_line(err)) from err
    name = settings.name or Path(settings.path).resolve().name
    device, dtype = torch.device(settings.device), torch_dtype(settings.dtype)
    return LanguageModel(network, folder.tokenizer, folder.config, name, device, dtype)
