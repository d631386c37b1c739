"""Where an SAE of SAELens belongs, and to which model: its ``metadata``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saeguard_sae import releases
from saeguard_sae.formats import parsed
from saeguard_sae.formats.parsed import Conventions, Place, Processing, SaeOrigin

# What a SAELens ``cfg.json`` says, in the spelling of its current version (6.54).


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
class SaelensConfig:
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
        parsed.choice(self.table, "architecture", ARCHITECTURES, CONFIG)
        dtype = self.table.get("dtype", "float32")
        parsed.choice({"dtype": str(dtype).removeprefix("torch.")}, "dtype", _DTYPES, CONFIG)

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


def current(config: Mapping[str, Any]) -> SaelensConfig:
    """The settings of SAELens 6, or of one of its training checkpoints.

    Raises:
        ValueError: an architecture or a key that is not known.
    """
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{CONFIG}: metadata must be a table, got {metadata!r}")
    architecture = parsed.choice(config, "architecture", ARCHITECTURES, CONFIG)
    known = BASE_KEYS | _TRAINING_KEYS | ARCHITECTURES[architecture] | {"metadata", "sae_lens_version"}
    parsed.check_keys(config, known, CONFIG)
    table = {key: value for key, value in config.items() if key != "metadata"}
    return SaelensConfig(table=table, metadata=metadata, stated=frozenset(table))


def is_current(config: Mapping[str, Any]) -> bool:
    """Whether SAELens 6 wrote it: since then there is a metadata table."""
    return "metadata" in config or bool(re.match(r"[6-9]|\d\d", str(config.get("sae_lens_version"))))


# What TransformerLens' from_pretrained does unless told otherwise, as SAELens has to be told.
PROCESSED = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True}
_CENTRED = {"center_writing_weights"}
# center_unembed changes logits alone.
_PROCESSING = ("fold_ln", "center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")


@dataclass(frozen=True, slots=True)
class HookPoint:
    """Where it reads and writes, and the model it was trained on."""

    reads: Place | None
    writes: tuple[Place, ...]
    processing: Processing
    model: str | None
    stated_l0: float | None


def hook_point(settings: SaelensConfig, origin: SaeOrigin | None, notes: Conventions) -> HookPoint:
    """What the metadata say; a place that is none of ours is left open.

    Raises:
        ValueError: an SAE of a single head, or a model processed in a way that is not supported.
    """
    _refuse_heads(settings)
    reads = _place(settings, "", notes)
    writes = _place(settings, "_out", notes) if settings.is_transcoder else None
    _note_heads(settings, notes)
    return HookPoint(
        reads,
        () if writes is None else (writes,),
        _processing(settings, origin, notes),
        _text(settings, "model_name"),
        None if settings.metadata.get("l0") is None else parsed.number(settings.metadata, "l0", settings.where + "l0"),
    )


def _place(settings: SaelensConfig, suffix: str, notes: Conventions) -> Place | None:
    """The place of ``hook_name``, else that of ``hf_hook_name``."""
    ours, theirs = f"hook_name{suffix}", f"hf_hook_name{suffix}"
    name, module = _text(settings, ours), _text(settings, theirs)
    found = {key: parsed.place(text) for key, text in ((ours, name), (theirs, module)) if text}
    chosen = ours
    # hook_mlp_in is before the norm, but SAELens also calls the norm's output so where it converts Gemma Scope 2.
    if found.get(ours) is None or (str(name).endswith("hook_mlp_in") and found.get(theirs) is not None):
        chosen = theirs
    for key, text in ((ours, name), (theirs, module)):
        if text and (key != chosen or found[key] is None):
            notes.note(key, text, settings.where + key)
    place = found.get(chosen)
    if place is not None:
        notes.note("writes" if suffix else "reads", place, settings.where + settings.spelled.get(chosen, chosen))
    return place


def _processing(settings: SaelensConfig, origin: SaeOrigin | None, notes: Conventions) -> Processing:
    given = settings.metadata.get("model_from_pretrained_kwargs")
    key = f"{settings.where}model_from_pretrained_kwargs"
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{key} must be a table, got {given!r}")
    on = {name for name in _PROCESSING if parsed.flag(given, name, False, key)}
    published = releases.at(origin.repo, origin.path) if origin else None
    if published is not None and published.is_centred:
        on, key = set(_CENTRED), releases.source()
    known: Mapping[frozenset[str], Processing] = {
        frozenset(): "none",
        frozenset(_CENTRED): "centred",
        frozenset(PROCESSED.keys() & set(_PROCESSING)): "transformer_lens",
    }
    if frozenset(on) not in known:
        raise ValueError(
            f"{key}: {', '.join(sorted(on))} without the rest is not supported; supported are center_writing_weights "
            "alone, and with fold_ln and fold_value_biases"
        )
    if on:
        notes.note("processing", known[frozenset(on)], key)
    return known[frozenset(on)]


def _refuse_heads(settings: SaelensConfig) -> None:
    for key in ("hook_head_index", "hook_head_index_out"):
        if settings.metadata.get(key) is not None:
            name = settings.where + settings.spelled.get(key, key)
            raise ValueError(f"{name}: SAEs of a single attention head are not supported")


def _note_heads(settings: SaelensConfig, notes: Conventions) -> None:
    """Activations at attn_z are flat here already, head after head, as the flag would make them."""
    key = "reshape_activations"
    if settings.table.get(key) is None:
        return
    if parsed.choice(settings.table, key, ("none", "hook_z"), CONFIG) == "hook_z":
        notes.note("heads", "side by side", settings.source(key))


def _text(settings: SaelensConfig, key: str) -> str | None:
    value: Any = settings.metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{settings.where}{settings.spelled.get(key, key)} must be text, got {value!r}")
    return value or None
