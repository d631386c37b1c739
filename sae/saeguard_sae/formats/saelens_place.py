"""Where an SAE of SAELens belongs, and to which model: its ``metadata``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saeguard_sae import releases
from saeguard_sae.formats import files, places
from saeguard_sae.formats.found import Conventions, Origin, Place, Processing
from saeguard_sae.formats.saelens_settings import CONFIG, Settings

# What TransformerLens' from_pretrained does unless told otherwise, as SAELens has to be told.
PROCESSED = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True}
_CENTRED = {"center_writing_weights"}
# center_unembed changes logits alone.
_PROCESSING = ("fold_ln", "center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")


@dataclass(frozen=True, slots=True)
class Belongs:
    """Where it reads and writes, and the model it was trained on."""

    reads: Place | None
    writes: tuple[Place, ...]
    processing: Processing
    model: str | None
    stated_l0: float | None


def belongs(settings: Settings, origin: Origin | None, said: Conventions) -> Belongs:
    """What the metadata say; a place that is none of ours is left open.

    Raises:
        ValueError: an SAE of a single head, or a model processed in a way that is not supported.
    """
    _refuse_heads(settings)
    reads = _place(settings, "", said)
    writes = _place(settings, "_out", said) if settings.is_transcoder else None
    _note_heads(settings, said)
    return Belongs(
        reads,
        () if writes is None else (writes,),
        _processing(settings, origin, said),
        _text(settings, "model_name"),
        None if settings.metadata.get("l0") is None else files.number(settings.metadata, "l0", settings.where + "l0"),
    )


def _place(settings: Settings, suffix: str, said: Conventions) -> Place | None:
    """The place of ``hook_name``, else that of ``hf_hook_name``."""
    ours, theirs = f"hook_name{suffix}", f"hf_hook_name{suffix}"
    name, module = _text(settings, ours), _text(settings, theirs)
    found = {key: places.place(text) for key, text in ((ours, name), (theirs, module)) if text}
    chosen = ours
    # hook_mlp_in is before the norm, but SAELens also calls the norm's output so where it converts Gemma Scope 2.
    if found.get(ours) is None or (str(name).endswith("hook_mlp_in") and found.get(theirs) is not None):
        chosen = theirs
    for key, text in ((ours, name), (theirs, module)):
        if text and (key != chosen or found[key] is None):
            said.note(key, text, settings.where + key)
    place = found.get(chosen)
    if place is not None:
        said.note("writes" if suffix else "reads", place, settings.where + settings.spelled.get(chosen, chosen))
    return place


def _processing(settings: Settings, origin: Origin | None, said: Conventions) -> Processing:
    given = settings.metadata.get("model_from_pretrained_kwargs")
    key = f"{settings.where}model_from_pretrained_kwargs"
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{key} must be a table, got {given!r}")
    on = {name for name in _PROCESSING if files.flag(given, name, False, key)}
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
        said.note("processing", known[frozenset(on)], key)
    return known[frozenset(on)]


def _refuse_heads(settings: Settings) -> None:
    for key in ("hook_head_index", "hook_head_index_out"):
        if settings.metadata.get(key) is not None:
            name = settings.where + settings.spelled.get(key, key)
            raise ValueError(f"{name}: SAEs of a single attention head are not supported")


def _note_heads(settings: Settings, said: Conventions) -> None:
    """Activations at attn_z are flat here already, head after head, as the flag would make them."""
    key = "reshape_activations"
    if settings.table.get(key) is None:
        return
    if files.choice(settings.table, key, ("none", "hook_z"), CONFIG) == "hook_z":
        said.note("heads", "side by side", settings.source(key))


def _text(settings: Settings, key: str) -> str | None:
    value: Any = settings.metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{settings.where}{settings.spelled.get(key, key)} must be text, got {value!r}")
    return value or None
