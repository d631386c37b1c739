"""What a SAELens ``cfg.json`` says, in the spelling of its current version (6.54)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saeguard_sae.formats import files

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


def words(text: str) -> frozenset[str]:
    """Those between its spaces."""
    return frozenset(text.split())


_COMPETING = frozenset({"k", "rescale_acts_by_decoder_norm"})
_TRANSCODER = frozenset({"d_out"})
_TEMPORAL = words(
    """n_heads n_attn_layers bottleneck_factor sae_diff_type kval_topk tied_weights
    activation_normalization_factor"""
)
_PURSUIT = frozenset({"residual_threshold", "max_iterations", "stop_on_duplicate_support"})

ARCHITECTURES: dict[str, frozenset[str]] = {
    "standard": frozenset(),
    "gated": frozenset(),
    "jumprelu": frozenset(),
    "topk": _COMPETING,
    "abstopk": _COMPETING,
    "batchtopk": _COMPETING,
    "matryoshka_batchtopk": _COMPETING,
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
    "matching_pursuit": _PURSUIT,
    "temporal": _TEMPORAL,
}
"""Each architecture and the keys that only it has."""

BASE_KEYS = words("architecture d_in d_sae dtype device apply_b_dec_to_input normalize_activations reshape_activations")
# What only training reads; it does not change what the weights compute.
_TRAINING_KEYS = words(
    """decoder_init_norm l1_coefficient l1_warm_up_steps lp_norm aux_loss_coefficient use_sparse_activations
    topk_threshold_lr matryoshka_widths use_matryoshka_aux_loss jumprelu_init_threshold jumprelu_bandwidth
    jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input l0_coefficient l0_warm_up_steps
    pre_act_loss_coefficient target_l0"""
)
_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``table`` holds what decides the arithmetic, ``metadata`` where it belongs."""

    table: Mapping[str, Any]
    metadata: Mapping[str, Any]
    stated: frozenset[str]
    """Keys of the table that the file has, rather than SAELens' defaults."""
    where: str = f"{CONFIG}: metadata."
    """How a key of ``metadata`` is called in messages, before its name."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """Keys that the file spells otherwise."""
    is_tanh: bool = False
    is_finetuned: bool | None = False
    """What ``finetuning_scaling_factor`` says; None where a file that could have it says nothing."""

    def __post_init__(self) -> None:
        files.choice(self.table, "architecture", ARCHITECTURES, CONFIG)
        dtype = self.table.get("dtype", "float32")
        files.choice({"dtype": str(dtype).removeprefix("torch.")}, "dtype", _DTYPES, CONFIG)

    @property
    def architecture(self) -> str:
        """One of ``ARCHITECTURES``."""
        return str(self.table["architecture"])

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.architecture.endswith("transcoder")

    @property
    def trained_by(self) -> tuple[int, int] | None:
        """SAELens' major and minor version that trained it, if stated."""
        match = re.match(r"(\d+)\.(\d+)", str(self.metadata.get("sae_lens_training_version")))
        return (int(match[1]), int(match[2])) if match else None

    def source(self, key: str) -> str:
        """Who decides ``key`` of the table."""
        return f"{CONFIG}: {self.spelled.get(key, key)}" if key in self.stated else "SAELens' default"


def current(config: Mapping[str, Any]) -> Settings:
    """The settings of SAELens 6, or of one of its training checkpoints.

    Raises:
        ValueError: an architecture or a key that is not known.
    """
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{CONFIG}: metadata must be a table, got {metadata!r}")
    architecture = files.choice(config, "architecture", ARCHITECTURES, CONFIG)
    known = BASE_KEYS | _TRAINING_KEYS | ARCHITECTURES[architecture] | {"metadata", "sae_lens_version"}
    files.check_keys(config, known, CONFIG)
    table = {key: value for key, value in config.items() if key != "metadata"}
    return Settings(table=table, metadata=metadata, stated=frozenset(table))


def is_current(config: Mapping[str, Any]) -> bool:
    """Whether SAELens 6 wrote it: since then there is a metadata table."""
    return "metadata" in config or bool(re.match(r"[6-9]|\d\d", str(config.get("sae_lens_version"))))
