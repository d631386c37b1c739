"""Folds of SAELens that leave what is computed as it is and rid the weights of one convention each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saeguard_sae.activations import Gated, JumpReLU
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats.saelens_arrival import WHITENING, Whitening


def finetuned(dictionary: Dictionary, factors: Tensor) -> Dictionary:
    """``(f * factors) @ W_dec``, as SAELens decoded before 6.0 after its fine-tuning against shrinkage."""
    return replace(dictionary, W_dec=dictionary.W_dec * factors[:, None])


def scaled(dictionary: Dictionary, scale: float, *, rescales: bool) -> Dictionary:
    """For inputs that are not multiplied by ``scale``, and outputs not divided by it.

    Features keep their values, unless they are rescaled by the decoder's norm (``rescales``), which this divides: then
    a threshold, which is in their units, goes along.
    """
    activation = dictionary.activation
    if rescales and isinstance(activation, JumpReLU):
        activation = JumpReLU(activation.threshold / scale)
    return replace(
        dictionary,
        W_enc=dictionary.W_enc * scale,
        W_dec=dictionary.W_dec / scale,
        b_dec=dictionary.b_dec / scale,
        activation=activation,
    )


def rescaled(dictionary: Dictionary) -> Dictionary:
    """Pre-activations times the norm of the feature's decoder row, and rows of norm 1."""
    norms = dictionary.W_dec.norm(dim=1)
    # A row of zeros stays one: its feature is never seen, whatever it is divided by.
    by = torch.where(norms > 0, norms, torch.ones_like(norms))
    return replace(
        dictionary,
        W_enc=dictionary.W_enc * norms,
        b_enc=dictionary.b_enc * norms,
        W_dec=dictionary.W_dec / by[:, None],
    )


def unwhitened(dictionary: Dictionary, whitening: Whitening) -> Dictionary:
    """For inputs that are not whitened, and outputs not taken back.

    Raises:
        ValueError: it is of another width.
    """
    if whitening.mean.shape != dictionary.b_dec.shape:
        raise ValueError(f"{WHITENING}: mean has {whitening.mean.numel()} values, but the SAE reads {dictionary.d_in}")
    # Transposed, the product comes out feature by feature as Dictionary keeps it.
    W_enc = (dictionary.W_enc.T.double() @ whitening.matrix.T).T
    W_dec = (dictionary.W_dec.double() @ whitening.inverse).float()
    b_dec = (dictionary.b_dec.double() @ whitening.inverse + whitening.mean).float()
    moved = replace(dictionary, W_enc=W_enc.float(), W_dec=W_dec, b_dec=b_dec)
    # Where b_dec is taken off the input, the mean in it already is.
    return moved if dictionary.centre else _shifted(moved, (whitening.mean @ W_enc).float())


def _shifted(dictionary: Dictionary, shift: Tensor) -> Dictionary:
    """Pre-activations less ``shift`` [d_sae]."""
    activation = dictionary.activation
    if isinstance(activation, Gated):
        b_mag = activation.b_mag - shift * activation.r_mag.exp()
        return replace(dictionary, activation=Gated(activation.b_gate - shift, b_mag, activation.r_mag))
    return replace(dictionary, b_enc=dictionary.b_enc - shift)
