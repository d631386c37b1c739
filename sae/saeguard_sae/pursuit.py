"""Matching pursuit SAEs: features are found one after another, each from what the ones before left over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from saeguard_sae.dictionary import BadDictionary, check_finite
from saeguard_sae.normalisation import Normalisation, normalise, restore


@dataclass(frozen=True, slots=True, eq=False)
class MatchingPursuit:
    """Tied weights ``W_dec`` [d_sae, d_in], ``b_dec`` [d_in]; SAELens' variant of Mallat and Zhang (1993).

    Each round takes the feature that fits the residual best, adds ``max(residual . d_j, 0)`` to it and takes it out of
    the residual; a token is done when its support did not change (``stop_on_duplicate_support``), its residual is
    shorter than ``residual_threshold`` (if that is above 0), or after ``max_iterations`` rounds.
    """

    W_dec: Tensor
    b_dec: Tensor
    max_iterations: int
    residual_threshold: float = 0.0
    stop_on_duplicate_support: bool = True
    centre: bool = True
    normalisation: Normalisation = "none"
    architecture: ClassVar[str] = "matching_pursuit"

    def __post_init__(self) -> None:
        if self.W_dec.ndim != 2 or tuple(self.b_dec.shape) != (self.W_dec.shape[1],):
            shapes = f"{tuple(self.W_dec.shape)} and {tuple(self.b_dec.shape)}"
            raise BadDictionary(f"W_dec and b_dec have shapes {shapes}, expected [d_sae, d_in] and [d_in]")
        if self.max_iterations < 1:
            raise BadDictionary(f"max_iterations must be at least 1, got {self.max_iterations}")
        for name, tensor in self.tensors().items():
            check_finite(name, tensor)

    @property
    def d_in(self) -> int:
        """Width of what is encoded."""
        return self.W_dec.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is decoded."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> features [..., d_sae], in the dictionary's dtype."""
        flat = normalise(self.normalisation, x.to(self.W_dec.dtype)).reshape(-1, self.d_in)
        residual = flat - self.b_dec if self.centre else flat.clone()
        features = residual.new_zeros(len(residual), self.d_sae)
        running = torch.arange(len(residual), device=x.device)
        for _ in range(self.max_iterations):
            if not len(running):
                break
            running = running[self._round(residual, features, running)]
        return features.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """features [..., d_sae] -> reconstruction [..., d_in]; SAELens adds ``b_dec`` only where it was taken off.

        Args:
            x: the tokens that were encoded; needed where a normalisation is taken back.

        Raises:
            ValueError: it is needed and not given.
        """
        decoded = features @ self.W_dec
        decoded = decoded + self.b_dec if self.centre else decoded
        if self.normalisation == "none":
            return decoded
        if x is None:
            raise ValueError(f"decoding under {self.normalisation} needs the tokens that were encoded")
        return restore(self.normalisation, decoded, x.to(decoded.dtype))

    def reconstruct(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_in]."""
        return self.decode(self.encode(x), x)

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by its name."""
        return {"W_dec": self.W_dec, "b_dec": self.b_dec}

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> MatchingPursuit:
        """The same dictionary elsewhere."""
        return replace(self, W_dec=self.W_dec.to(device, dtype), b_dec=self.b_dec.to(device, dtype))

    def _round(self, residual: Tensor, features: Tensor, running: Tensor) -> Tensor:
        """One round for the tokens ``running``, in place; bool, which of them go on."""
        scores = residual[running] @ self.W_dec.T
        best = scores.argmax(dim=-1)
        value = scores.gather(1, best[:, None]).relu()
        was_on = features[running, best] != 0
        features[running, best] += value[:, 0]
        residual[running] -= value * self.W_dec[best]
        goes_on = torch.ones_like(was_on)
        if self.stop_on_duplicate_support:
            goes_on &= ~was_on & (value[:, 0] != 0)
        if self.residual_threshold > 0:
            goes_on &= residual[running].norm(dim=-1) >= self.residual_threshold
        return goes_on
