"""A place in the model, with one spelling: ``resid_post.12``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Point: TypeAlias = Literal[
    "embed",
    "resid_pre",
    "attn_z",
    "attn_raw",
    "attn_out",
    "resid_mid",
    "mlp_read",
    "mlp_normalized",
    "mlp_in",
    "mlp_act",
    "mlp_raw",
    "mlp_out",
    "resid_post",
]
"""Where in a layer, in the order of a forward pass: the token embedding (layer 0 only); the residual stream before the
block; the heads' outputs before the output projection; what attention adds to the stream, before (``attn_raw``, where
the architecture has one) and after the norm on it; the stream between attention and MLP; the same as the MLP alone
reads it, before its norm; that normalised, without the norm's gain and bias; the MLP's input after its norm; its hidden
activation; what it adds to the stream, before (``mlp_raw``) and after the norm on it; the stream after the block."""

POINTS: tuple[Point, ...] = get_args(Point)


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """``point`` of block ``layer``; prints and parses as ``point.layer``."""

    layer: int
    point: Point

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"{self.point!r} is not a point; one of {', '.join(POINTS)}")
        if self.layer < 0 or (self.point == "embed" and self.layer != 0):
            raise ValueError(f"{self.point}.{self.layer} is not a site: no such layer")

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site a text names.

        Raises:
            ValueError: anything but ``point.layer``.
        """
        for point in POINTS:
            layer = text.removeprefix(f"{point}.")
            if layer != text and layer.isascii() and layer.isdigit() and str(int(layer)) == layer:
                return cls(int(layer), point)
        raise ValueError(f"{text!r} is not a site; write it like 'resid_post.12', points are {', '.join(POINTS)}")
