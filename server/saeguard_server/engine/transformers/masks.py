"""Attention masks in the form each Hugging Face architecture takes them ready-made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# These choose a mask per layer type from a dictionary; the others take one tensor for all layers.
_BY_LAYER_TYPE = ("qwen2", "qwen3", "gemma2", "gemma3_text")


class Masks:
    """Builds causal masks, with a sliding window where the model has one.

    Args:
        config: the model's Hugging Face configuration.
        is_additive: the attention adds the mask (eager) instead of taking booleans (SDPA).
        dtype: of the model's activations.
    """

    def __init__(self, config: Any, *, is_additive: bool, dtype: torch.dtype) -> None:
        self._by_type = config.model_type in _BY_LAYER_TYPE
        self._types = set(config.layer_types) if self._by_type else set()
        self._sliding: int | None = getattr(config, "sliding_window", None)
        self._is_additive, self._dtype = is_additive, dtype

    def build(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """positions [B, T] of the queries over ``length`` keys -> [B, 1, T, length], or one such per layer type."""
        key = torch.arange(length, device=positions.device)
        causal = key <= positions[..., None]
        if not self._by_type:
            return self._finish(self._slide(causal, positions, key) if self._sliding else causal)
        masks = {"full_attention": causal}
        if "sliding_attention" in self._types:
            masks["sliding_attention"] = self._slide(causal, positions, key)
        return {name: self._finish(mask) for name, mask in masks.items()}

    def _slide(self, causal: Tensor, positions: Tensor, key: Tensor) -> Tensor:
        assert self._sliding is not None, "a sliding layer needs a window"
        return causal & (key > positions[..., None] - self._sliding)

    def _finish(self, mask: Tensor) -> Tensor:
        mask = mask[:, None]
        if not self._is_additive:
            return mask
        floor = torch.finfo(self._dtype).min
        return torch.zeros(mask.shape, dtype=self._dtype, device=mask.device).masked_fill(~mask, floor)
