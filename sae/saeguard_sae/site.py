"""A place in the model, with one spelling: ``resid_post.12``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Point: TypeAlias = Literal[
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_z",
    "attn_out",
    "mlp_in",
    "mlp_act",
    "mlp_out",
]
"""Where in a layer: the token embedding (layer 0 only), the residual stream before, inside and after a block, heads'
outputs before and after the output projection, the MLP's normalised input, its hidden activation, its output."""

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
