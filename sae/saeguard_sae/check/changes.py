"""Each convention that an SAE may have been given wrongly, as a change of how it is read, with the setting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig
from saeguard_sae.check.measure import is_transcoder
from saeguard_sae.check.tally import Reader
from saeguard_sae.check.variant import Variant
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats.found import Convention
from saeguard_sae.loading import LoadedSae
from saeguard_sae.normalisation import NORMALISATIONS, Normalisation
from saeguard_sae.processing import as_unprocessed
from saeguard_sae.selections import is_selection
from saeguard_sae.site import Site

Kind: TypeAlias = Literal["site", "bias", "normalisation", "decoder norms", "scale", "processing"]

SCALE = "activation scale"
"""The convention of this name is the factor folded into the weights."""
USERS = ("the user", "the settings")
"""Who says so, where the user does."""

_ALIKE = 0.01
"""Factors all this near to 1 make no difference that could be seen."""
_OF_DICTIONARY = ("centre", "normalisation", "b_enc", "b_dec")


class Setup(NamedTuple):
    """Where an SAE reads, whose activations it must reproduce, and by which conventions."""

    reads: Site
    target: Site | None
    reader: Reader


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One thing done otherwise. ``setting``: what to write into the settings for it, None where there is none."""

    kind: Kind
    what: str
    setting: str | None
    apply: Callable[[Setup], Setup]

    def then(self, other: Change) -> Change:
        """Both at once."""
        both = None if self.setting is None or other.setting is None else f"{self.setting}\n{other.setting}"
        return Change(self.kind, f"{self.what}, and {other.what}", both, lambda setup: other.apply(self.apply(setup)))


def conventions(
    sae: LoadedSae, model: nn.Module, config: ModelConfig, x: Tensor, target: Tensor | None
) -> list[Change]:
    """The changes of everything but the site.

    Args:
        x: [n, d_in] what it reads.
        target: [n, d_out] what it must reproduce.
    """
    if not isinstance(sae.dictionary, Dictionary):
        return []
    return [
        *_bias(sae, sae.dictionary),
        *_normalisation(sae, sae.dictionary, model, config),
        *_processing(sae, sae.dictionary, model, config),
        *_decoder_norms(sae, sae.dictionary),
        *_scale(sae, sae.dictionary, x, target),
    ]


def stated(sae: LoadedSae, name: str) -> Convention | None:
    """A convention as it was decided when the SAE was loaded."""
    return next((one for one in reversed(sae.conventions) if one.name == name), None)


def processing(sae: LoadedSae) -> str:
    """How the model was changed that it was trained on, as far as is known."""
    known = stated(sae, "processing")
    return "none" if known is None else known.value


def _bias(sae: LoadedSae, dictionary: Dictionary) -> Iterator[Change]:
    if dictionary.d_in != dictionary.d_out or not bool(dictionary.b_dec.any()):
        return
    if sae.site.point == "attn_z" and processing(sae) == "transformer_lens":
        return  # the model's value bias is already moved into the biases, by the convention that would change
    flipped = not dictionary.centre
    what = f"b_dec is {'' if flipped else 'not '}subtracted from what it encodes"
    setting = f"apply_b_dec_to_input = {'true' if flipped else 'false'}"
    yield Change("bias", what, setting, _with(centre=flipped))


def _normalisation(sae: LoadedSae, dictionary: Dictionary, model: nn.Module, config: ModelConfig) -> Iterator[Change]:
    own = dictionary.normalisation
    plain = replace(dictionary, normalisation="none")
    # Only a stream that layer norms read has a mean which can be taken out.
    has_mean = as_unprocessed(plain, sae.site, "centred", model, config)[0].normalisation == "centred"
    for kind in NORMALISATIONS:
        if kind != own and (kind != "centred" or has_mean):
            what = _NORMALISED[kind].format(own=_NOT[own])
            yield Change("normalisation", what, _normalisation_setting(own, kind), _with(normalisation=kind))


_NORMALISED: dict[Normalisation, str] = {
    "none": "each token is encoded as it is{own}",
    "layer_norm": "each token is encoded after layer_norm{own}",
    "constant_norm_rescale": "each token is encoded after constant_norm_rescale{own}",
    "centred": "the mean is taken out of each token before it is encoded{own}",
}
_NOT: dict[Normalisation, str] = {
    "none": "",
    "layer_norm": ", not after layer_norm",
    "constant_norm_rescale": ", not after constant_norm_rescale",
    "centred": ", not without its mean",
}


def _normalisation_setting(own: Normalisation, kind: Normalisation) -> str:
    if kind == "centred":
        centred = 'processing = "centred"'
        return centred if own == "none" else f'normalize_activations = "none"\n{centred}'
    if own != "centred":
        return f'normalize_activations = "{kind}"'
    plain = 'processing = "none"'
    return plain if kind == "none" else f'normalize_activations = "{kind}"\n{plain}'


def _processing(sae: LoadedSae, dictionary: Dictionary, model: nn.Module, config: ModelConfig) -> Iterator[Change]:
    """Value biases moved out of attention. The other half, an MLP's input without the norm's gain, is a site."""
    if sae.site.point != "attn_z" or processing(sae) != "none":
        return
    try:
        shifted, _ = as_unprocessed(dictionary, sae.site, "transformer_lens", model, config)
    except ValueError:  # no exact counterpart: then it cannot be set either
        return
    if shifted is not dictionary:
        what, setting = "the model it was trained on had its value biases folded", 'processing = "transformer_lens"'
        yield Change("processing", what, setting, _with(b_enc=shifted.b_enc, b_dec=shifted.b_dec))


def _decoder_norms(sae: LoadedSae, dictionary: Dictionary) -> Iterator[Change]:
    """Rows as the files have them: a scale that was folded into them is taken out again."""
    rows = torch.linalg.vector_norm(dictionary.W_dec, dim=1, dtype=torch.float32)
    rows = rows * _known_scale(sae)
    if bool(((rows - 1).abs() < _ALIKE).all()):
        return
    dtype = dictionary.W_dec.dtype
    norms = rows.to(dtype).clamp_min(torch.finfo(dtype).tiny)
    competes = is_selection(dictionary.activation)
    # Features that do not compete only change by the factor, whether it comes before or after.
    side = "before" if competes else "after"
    yield Change("decoder norms", "its features are of unit decoder rows", None, _with(**{side: 1 / norms}))
    yield Change("decoder norms", "its features are to be multiplied by the norms of their decoder rows", None,
                 _with(**{side: norms}))  # fmt: skip
    if competes or dictionary.activation.parameters():
        compared = "ranked by" if competes else "compared with their thresholds as"
        yield Change("decoder norms", f"its features are {compared} value x norm of the decoder row",
                     _gating(sae, "saelens", "openmoss"), _with(before=norms, after=1 / norms))  # fmt: skip
        yield Change("decoder norms", f"its features are {compared} value / norm of the decoder row",
                     _gating(sae, "openmoss", "saelens"), _with(before=1 / norms, after=norms))  # fmt: skip


def _gating(sae: LoadedSae, own: str, other: str) -> str | None:
    rule = stated(sae, "gating")
    return f'gating = "{other}"' if rule is not None and rule.value.startswith(own) else None


def _scale(sae: LoadedSae, dictionary: Dictionary, x: Tensor, target: Tensor | None) -> Iterator[Change]:
    """The mean norm that the SAE was trained on is sqrt(width) in most libraries; files often leave the factor out."""
    total, known = _factor(x), _known_scale(sae)
    ahead = total / known
    if not isfinite(ahead) or ahead <= 0 or abs(ahead - 1) < _ALIKE:
        return
    what = f"its activations are scaled by {total:.4g} (sqrt(d_in) / their mean norm here), not by {known:.4g}"
    setting = f"scale = {total:.4g}" if _asks_for_scale(sae) else None
    yield Change("scale", what, setting, _with(scale_in=ahead, scale_out=ahead))
    if target is not None and is_transcoder(sae):
        out = _factor(target)
        what = f"what it reads is scaled by {total:.4g}, what it writes by {out:.4g} (from their mean norms here)"
        yield Change("scale", what, None, _with(scale_in=ahead, scale_out=out / known))


def _factor(x: Tensor) -> float:
    return float(x.shape[-1] ** 0.5 / x.float().norm(dim=-1).mean())


def _known_scale(sae: LoadedSae) -> float:
    """The factor that is folded into the weights."""
    known = stated(sae, SCALE)
    try:
        return 1.0 if known is None else float(known.value)
    except ValueError:  # "none", or that of each token
        return 1.0


def _asks_for_scale(sae: LoadedSae) -> bool:
    """Whether the factor came from the user; where files state it or have none, the format refuses another."""
    known = stated(sae, SCALE)
    return known is not None and known.source in USERS


def _with(**fields: Any) -> Callable[[Setup], Setup]:
    """The change of these fields, of the dictionary or of its variant."""

    def apply(setup: Setup) -> Setup:
        assert isinstance(setup.reader, Variant), "other coders have no such conventions"
        own = {name: value for name, value in fields.items() if name in _OF_DICTIONARY}
        dictionary = replace(setup.reader.dictionary, **own) if own else setup.reader.dictionary
        rest = {name: value for name, value in fields.items() if name not in own}
        return setup._replace(reader=replace(setup.reader, dictionary=dictionary, **rest))

    return apply
