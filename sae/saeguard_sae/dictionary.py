"""One sparse dictionary in memory, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saeguard_sae.activations import Activation, Columns
from saeguard_sae.normalisation import NORMALISATIONS, Normalisation, normalise, restore
from saeguard_sae.selections import is_selection


class BadDictionary(ValueError):
    """Weights that cannot be an SAE: shapes disagree or values are not finite."""


class EncoderRows(NamedTuple):
    """Features alone: their encoder rows [n, d_in], and the scalars [n] of their activation, centring folded in."""

    weights: Tensor
    scalars: Columns


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """An SAE or a transcoder: ``f = activation((n - b_dec if centre else n) @ W_enc + b_enc)``, ``f @ W_dec + b_dec``.

    ``n`` is x after its ``normalisation``; an SAE's decoded vector is taken back out of it, a transcoder's is not.
    Shapes: ``W_enc`` [d_in, d_sae], ``b_enc`` [d_sae], ``W_dec`` [d_sae, d_out], ``b_dec`` [d_out], ``W_skip``
    [d_out, d_in]. Decoder-norm rescaling and constant input scaling are already folded into the weights. In memory
    ``W_enc`` lies feature by feature, so that one feature's row is one contiguous read.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation
    centre: bool = True
    normalisation: Normalisation = "none"
    is_transcoder: bool = False
    W_skip: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "W_enc", feature_major(self.W_enc))
        self._check_shapes()
        for name, tensor in self.tensors().items():
            check_finite(name, tensor)

    @property
    def d_in(self) -> int:
        """Width of what is encoded."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is decoded; of all sites together for a dictionary that writes at several."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def architecture(self) -> str:
        """Its name for people: the activation's, with what it is when it is not an SAE."""
        kind = "_skip_transcoder" if self.W_skip is not None else "_transcoder" if self.is_transcoder else ""
        return self.activation.name + kind

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> features [..., d_sae], in the dictionary's dtype."""
        return self.activation(self.pre_activations(x))

    def pre_activations(self, x: Tensor, features: slice = slice(None)) -> Tensor:
        """x [..., d_in] -> what the activation sees of these features [..., n]."""
        n = normalise(self.normalisation, x.to(self.W_enc.dtype))
        if self.centre:
            n = n - self.b_dec
        return n @ self.W_enc[:, features] + self.b_enc[features]

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """features [..., d_sae] -> reconstruction [..., d_out], without the skip connection.

        Args:
            x: the tokens that were encoded; needed where the normalisation is taken back.

        Raises:
            ValueError: it is needed and not given.
        """
        decoded = features @ self.W_dec + self.b_dec
        if self.normalisation == "none" or self.is_transcoder:
            return decoded
        if x is None:
            raise ValueError(f"decoding under {self.normalisation} needs the tokens that were encoded")
        return restore(self.normalisation, decoded, x.to(decoded.dtype))

    def reconstruct(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]: encoded, decoded, and the skip connection of the raw x added."""
        out = self.decode(self.encode(x), x)
        return out if self.W_skip is None else out + x.to(out.dtype) @ self.W_skip.T

    def centred_bias(self) -> Tensor:
        """[d_sae] ``b_enc`` with the centring folded in, so that ``p = n @ W_enc + centred_bias``; in float32."""
        return self.b_enc.float() - self.b_dec.float() @ self.W_enc.float() if self.centre else self.b_enc.float()

    def encoder_rows(self, features: Tensor) -> EncoderRows:
        """What these features, int64 [n], are computed from, in float32."""
        weights, bias = self.W_enc.T[features].float(), self.b_enc[features].float()
        if self.centre:
            bias = bias - weights @ self.b_dec.float()
        own = {name: tensor[features].float() for name, tensor in self.activation.parameters().items()}
        return EncoderRows(weights, self.activation.with_parameters(own).columns(bias))

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by its name."""
        weights = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        skip = {} if self.W_skip is None else {"W_skip": self.W_skip}
        return weights | skip | self.activation.parameters()

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Dictionary:
        """The same dictionary elsewhere."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.tensors().items()}
        own = {name: moved.pop(name) for name in self.activation.parameters()}
        activation = self.activation.with_parameters(own)
        return Dictionary(
            **moved,
            activation=activation,
            centre=self.centre,
            normalisation=self.normalisation,
            is_transcoder=self.is_transcoder,
        )

    def _check_shapes(self) -> None:
        for name in ("W_enc", "W_dec"):
            if (found := getattr(self, name)).ndim != 2:
                raise BadDictionary(f"{name} must have two dimensions, has shape {tuple(found.shape)}")
        d_sae, d_out = self.W_dec.shape
        d_in = self.W_enc.shape[0] if self.is_transcoder else d_out
        wanted: dict[str, tuple[int, ...]] = {
            "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)
        }  # fmt: skip
        for name, tensor in self.tensors().items():
            shape = wanted.get(name, (d_sae,))
            if tuple(tensor.shape) != shape:
                raise BadDictionary(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if not d_sae or not d_in or not d_out:
            raise BadDictionary(f"W_dec is empty: its shape is {(d_sae, d_out)}")
        if self.centre and d_in != d_out:
            raise BadDictionary(f"b_dec cannot be taken from the input: it is {d_out} wide, the input {d_in}")
        if self.normalisation not in NORMALISATIONS:
            raise BadDictionary(f"normalisation {self.normalisation!r} is not one of {', '.join(NORMALISATIONS)}")
        self._check_selection(d_sae)

    def _check_selection(self, d_sae: int) -> None:
        if not is_selection(self.activation):
            return
        k = max(self.activation.limit, self.activation.groups)
        if min(self.activation.limit, self.activation.groups) < 1 or k > d_sae:
            raise BadDictionary(f"k must be 1 to d_sae ({d_sae}), got {k}")
        if d_sae % self.activation.groups:
            raise BadDictionary(f"k ({k}) must divide d_sae ({d_sae}) into equal groups")


def feature_major(W_enc: Tensor) -> Tensor:
    """[d_in, d_sae] with each feature's row contiguous in memory; a view where it already is.

    A loader calls it where it reads: then the file's own layout is let go before the next weight is read.
    """
    return W_enc.T.contiguous().T if W_enc.ndim == 2 else W_enc


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity without a copy of the tensor.

    Raises:
        BadDictionary: there is one.
    """
    # Turned the way it lies in memory: of a turned matrix aminmax makes a copy.
    flat = tensor.T if tensor.ndim == 2 and tensor.T.is_contiguous() else tensor
    if flat.numel() and not all(torch.isfinite(one) for one in torch.aminmax(flat.detach())):
        raise BadDictionary(f"{name} holds values that are not finite")
