"""What the front end knows of an SAE whose weights are in another process: everything but the weights.

Its tensors are on torch's "meta" device: shapes without memory. The class is the real one, so that whoever asks what
the SAE is (how wide, what architecture, whether it can be edited) gets the answer it would get in the engine, and
whoever computes with it gets an error and not a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.loading import LoadedSae

_ROWS = 4096
"""Decoder rows turned to float32 at once."""


@dataclass(frozen=True, slots=True, eq=False)
class DistantSae(LoadedSae):
    """An SAE without its weights."""

    decoder_norms: Tensor = field(kw_only=True)
    """[d_sae] lengths of the decoder's rows, in float32: what the unit "unit_decoder" needs."""

    def decoder_norm(self, feature: int) -> float:
        """The length of what one unit of the feature writes."""
        return float(self.decoder_norms[feature])


def describe(sae: LoadedSae) -> DistantSae:
    """The SAE as the front end gets it."""
    known = {one.name: getattr(sae, one.name) for one in fields(LoadedSae)}
    known |= {name: hollow(known[name]) for name in ("dictionary", "write_gain")}
    return DistantSae(**known, decoder_norms=_norms(sae.dictionary.W_dec))


def hollow(value: Any) -> Any:
    """The same value with every tensor in it on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(hollow(one) for one in value)
    if isinstance(value, dict):
        return {key: hollow(one) for key, one in value.items()}
    return _hollow_object(value) if is_dataclass(value) else value


def _hollow_object(value: Any) -> Any:
    # Not through the constructor: it checks that weights are finite, which was done where they are.
    made = object.__new__(type(value))
    for one in fields(value):
        object.__setattr__(made, one.name, hollow(getattr(value, one.name)))
    return made


def _norms(W_dec: Tensor) -> Tensor:
    """W_dec [d_sae, d_out] -> [d_sae], on the host."""
    parts = [W_dec[first : first + _ROWS].float().norm(dim=1) for first in range(0, len(W_dec), _ROWS)]
    return torch.cat(parts).cpu()
