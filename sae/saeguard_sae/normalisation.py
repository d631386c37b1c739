"""What a token goes through before it is encoded, and how a decoded vector comes back: per-token shift and scales.

The names are SAELens' own, besides ``centred``: what TransformerLens' ``center_writing_weights`` does to the stream.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

Normalisation: TypeAlias = Literal["none", "layer_norm", "constant_norm_rescale", "centred"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)

_EPS = 1e-5
_TINY = 1e-30


class Frame(NamedTuple):
    """Per token [..., 1]: it is encoded as ``(x - shift) / divisor``; a decoded r means ``r * scale + shift``."""

    shift: Tensor
    divisor: Tensor
    scale: Tensor


def frame(kind: Normalisation, x: Tensor) -> Frame:
    """x [..., d_in] -> its frame.

    ``layer_norm`` takes the standard deviation with Bessel's correction and adds 1e-5 on the way in alone, as SAELens,
    OpenAI and Bussmann do. A token of zeros has no direction: under ``constant_norm_rescale`` it stays zeros, where
    SAELens gives NaN.
    """
    zeros, ones = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
    match kind:
        case "none":
            return Frame(zeros, ones, ones)
        case "layer_norm":
            shift = x.mean(dim=-1, keepdim=True)
            deviation = (x - shift).std(dim=-1, keepdim=True)
            return Frame(shift, deviation + _EPS, deviation)
        case "constant_norm_rescale":
            norm = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return Frame(zeros, norm.clamp_min(_TINY), norm)
        case "centred":
            return Frame(x.mean(dim=-1, keepdim=True), ones, ones)


def normalise(kind: Normalisation, x: Tensor) -> Tensor:
    """x [..., d_in] as it is encoded."""
    if kind == "none":
        return x
    found = frame(kind, x)
    return (x - found.shift) / found.divisor


def restore(kind: Normalisation, decoded: Tensor, x: Tensor) -> Tensor:
    """What was decoded for token ``x``, in the model's units."""
    if kind == "none":
        return decoded
    found = frame(kind, x)
    return decoded * found.scale + found.shift
