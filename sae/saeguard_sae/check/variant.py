"""A dictionary read by other conventions than its own, without a copy of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saeguard_sae.dictionary import Dictionary


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """``dictionary`` on scaled activations, with its features scaled before and after the activation function.

    What is folded into weights elsewhere is multiplied here: a published dictionary can take gigabytes, and many
    conventions are tried on one.
    """

    dictionary: Dictionary
    scale_in: float = 1.0
    """Multiplies what is encoded."""
    scale_out: float = 1.0
    """Divides what is decoded."""
    before: Tensor | None = None
    """[d_sae] multiplies pre-activations: what thresholds and rivals are compared with."""
    after: Tensor | None = None
    """[d_sae] multiplies features before they are decoded."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.dictionary.d_sae

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> features [..., d_sae]."""
        pre = self.dictionary.pre_activations(self._scaled(x))
        return self.dictionary.activation(pre if self.before is None else pre * self.before)

    def decode(self, features: Tensor, x: Tensor) -> Tensor:
        """features [..., d_sae] of x -> [..., d_out], with the skip connection of the raw x."""
        values = features if self.after is None else features * self.after
        out = self.dictionary.decode(values, self._scaled(x)) / self.scale_out
        skip = self.dictionary.W_skip
        return out if skip is None else out + x.to(out.dtype) @ skip.T

    def _scaled(self, x: Tensor) -> Tensor:
        return x.to(self.dictionary.W_enc.dtype) * self.scale_in
