"""One sparse dictionary in memory, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.activations import Activation


class BadDictionary(ValueError):
    """Weights that cannot be an SAE: shapes disagree or values are not finite."""


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """An SAE: ``f = activation((x - b_dec if centre else x) @ W_enc + b_enc)``, ``x ~ f @ W_dec + b_dec``.

    Shapes: ``W_enc`` [d_in, d_sae], ``b_enc`` [d_sae], ``W_dec`` [d_sae, d_in], ``b_dec`` [d_in]. Decoder-norm
    rescaling and training-time input scaling are already folded into the weights.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation
    centre: bool = True

    def __post_init__(self) -> None:
        self._check_shapes()
        for name, tensor in self.tensors().items():
            if tensor.numel() and not torch.isfinite(tensor).all():
                raise BadDictionary(f"{name} holds values that are not finite")

    @property
    def d_in(self) -> int:
        """Width of what is encoded."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> features [..., d_sae], in the dictionary's dtype."""
        x = x.to(self.W_enc.dtype)
        if self.centre:
            x = x - self.b_dec
        return self.activation(x @ self.W_enc + self.b_enc)

    def decode(self, features: Tensor) -> Tensor:
        """features [..., d_sae] -> reconstruction [..., d_in]."""
        return features @ self.W_dec + self.b_dec

    def centred_bias(self) -> Tensor:
        """[d_sae] ``b_enc`` with the centring folded in, so that ``p = x @ W_enc + centred_bias``."""
        return self.b_enc - self.b_dec @ self.W_enc if self.centre else self.b_enc

    def only(self, feature: int) -> Dictionary:
        """The dictionary of that one feature, which a local activation computes alone."""
        j = slice(feature, feature + 1)
        own = {name: tensor[j] for name, tensor in self.activation.parameters().items()}
        activation = self.activation.with_parameters(own)
        return Dictionary(self.W_enc[:, j], self.b_enc[j], self.W_dec[j], self.b_dec, activation, self.centre)

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by its name."""
        weights = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return weights | self.activation.parameters()

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Dictionary:
        """The same dictionary elsewhere."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.tensors().items()}
        own = {name: moved[name] for name in self.activation.parameters()}
        activation = self.activation.with_parameters(own)
        weights = {name: moved[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        return Dictionary(**weights, activation=activation, centre=self.centre)

    def _check_shapes(self) -> None:
        if self.W_dec.ndim != 2:
            raise BadDictionary(f"W_dec must have two dimensions, has shape {tuple(self.W_dec.shape)}")
        d_sae, d_in = self.W_dec.shape
        wanted: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_dec": (d_in,)}
        for name, tensor in self.tensors().items():
            shape = wanted.get(name, (d_sae, d_in) if name == "W_dec" else (d_sae,))
            if tuple(tensor.shape) != shape:
                raise BadDictionary(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        k = getattr(self.activation, "k", 1)
        if not 1 <= k <= d_sae:
            raise BadDictionary(f"k must be 1 to d_sae ({d_sae}), got {k}")
