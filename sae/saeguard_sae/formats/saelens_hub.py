"""What SAELens' own list of published SAEs (6.54) says of some hub repositories against what their files say."""

from __future__ import annotations

from saeguard_sae.formats.found import Origin

SOURCE = "SAELens' list of published SAEs"

_CENTRED = (
    "jbloom/GPT2-Small-SAEs-Reformatted",
    "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "tommmcgrath/gpt2-small-mlp-out-saes",
)
_NORMALISED = {"JoshEngels/Mistral-7B-Residual-Stream-SAEs": "constant_norm_rescale"}


def is_centred(origin: Origin | None) -> bool:
    """Whether the SAEs from there read a model whose writing weights were centred."""
    return origin is not None and origin.repo in _CENTRED


def normalisation(origin: Origin | None) -> str | None:
    """``normalize_activations`` of the SAEs from there, where it is not what their files say."""
    return None if origin is None else _NORMALISED.get(origin.repo)
