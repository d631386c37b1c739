"""The conventions by which an activation reaches the encoder, each got wrong: bias, normalisation, processing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig
from saeguard_sae.check import stated
from saeguard_sae.check.changes import Change, of_coder, of_dictionary
from saeguard_sae.check.units import decoder_norms, scales
from saeguard_sae.coder import SparseCoder
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.loading import LoadedSae
from saeguard_sae.normalisation import NORMALISATIONS, Normalisation
from saeguard_sae.processing import as_unprocessed, value_bias
from saeguard_sae.temporal import Temporal


def conventions(
    sae: LoadedSae, model: nn.Module, config: ModelConfig, x: Tensor, target: Tensor | None
) -> list[Change]:
    """The changes of everything but the site.

    Args:
        x: [n, d_in] what it reads.
        target: [n, d_out] what it must reproduce.
    """
    coder = sae.dictionary
    if isinstance(coder, Temporal):
        return []
    if not isinstance(coder, Dictionary):
        return [*_bias(coder), *_normalisation(sae, coder, model, config)]
    # In this order: an SAE is loaded so, and what is folded last has taken in what came before.
    folded = [*_processing(sae, coder, model, config), *decoder_norms(sae, coder)]
    if sae.site.point == "attn_z" and stated.processing(sae) == "transformer_lens":
        return folded
    return [*_bias(coder), *_normalisation(sae, coder, model, config), *folded, *scales(sae, x, target)]


def _bias(coder: SparseCoder) -> Iterator[Change]:
    assert not isinstance(coder, Temporal), "it leaves no such choice"
    if coder.d_in != coder.d_out or not bool(coder.b_dec.any()):
        return
    flipped = not coder.centre
    what = f"b_dec is {'' if flipped else 'not '}subtracted from what it encodes"
    setting = f"apply_b_dec_to_input = {'true' if flipped else 'false'}"
    yield Change("bias", what, setting, of_coder(centre=flipped))


def _normalisation(sae: LoadedSae, coder: SparseCoder, model: nn.Module, config: ModelConfig) -> Iterator[Change]:
    assert not isinstance(coder, Temporal), "it leaves no such choice"
    own = coder.normalisation
    for kind in NORMALISATIONS:
        if kind != own and (kind != "centred" or _has_mean(sae, coder, model, config)):
            what = f"{_NORMALISED[kind]}{_NOT[own]}"
            yield Change("normalisation", what, _normalisation_setting(own, kind), of_coder(normalisation=kind))


def _has_mean(sae: LoadedSae, coder: SparseCoder, model: nn.Module, config: ModelConfig) -> bool:
    """Only a stream that layer norms read has a mean which can be taken out."""
    if not isinstance(coder, Dictionary):
        return False
    plain = replace(coder, normalisation="none")
    return as_unprocessed(plain, sae.site, "centred", model, config)[0].normalisation == "centred"


_NORMALISED: dict[Normalisation, str] = {
    "none": "each token is encoded as it is",
    "layer_norm": "each token is encoded after layer_norm",
    "constant_norm_rescale": "each token is encoded after constant_norm_rescale",
    "centred": "the mean is taken out of each token before it is encoded",
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
    if sae.site.point != "attn_z" or dictionary.normalisation != "none" or dictionary.is_transcoder:
        return
    try:
        bias = value_bias(model, config, sae.site.layer)
    except ValueError:  # an architecture where it is not known: nobody can have set it either
        return
    if bias is None:
        return
    shift = bias.to(dictionary.W_enc)
    if stated.processing(sae) == "transformer_lens":
        what, setting = "the model it was trained on had its value biases in place", 'processing = "none"'
        yield Change("processing", what, setting, of_dictionary(lambda one: _moved(one, -shift)))
    else:
        what, setting = "the model it was trained on had its value biases folded", 'processing = "transformer_lens"'
        yield Change("processing", what, setting, of_dictionary(lambda one: _moved(one, shift)))


def _moved(dictionary: Dictionary, shift: Tensor) -> Dictionary:
    """The SAE of ``x - shift`` as an SAE of x."""
    b_dec = dictionary.b_dec + shift
    if dictionary.centre:
        return replace(dictionary, b_dec=b_dec)
    return replace(dictionary, b_enc=dictionary.b_enc - shift @ dictionary.W_enc, b_dec=b_dec)
