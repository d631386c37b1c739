"""What a format's loader is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from saeguard_sae.coder import SparseCoder
from saeguard_sae.site import Site

Processing: TypeAlias = Literal["none", "centred", "transformer_lens"]
"""How TransformerLens changed the model that the SAE was trained on: not at all; ``center_writing_weights`` alone; all
of its defaults (folded norms, centred weights, folded value biases)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the files were published: a hub repository, and the path of the SAE in it ("" for the whole)."""

    repo: str
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the user says where files are silent or ambiguous. A format that cannot use a choice refuses it."""

    scale: float | None = None
    """The factor that takes activations to the scale the SAE was trained on (SAELens' norm_scaling_factor)."""
    gating: Literal["openmoss", "saelens"] | None = None
    """Whose rule decides whether a Llama Scope feature fires: with the decoder's norm (openmoss) or without."""
    k: int | None = None
    """Features kept per token, where the files do not say."""
    scale_said_by: str = "the user"

    def given(self) -> dict[str, Any]:
        """Every choice by its name."""
        return {"scale": self.scale, "gating": self.gating, "k": self.k}


@dataclass(frozen=True, slots=True)
class Source:
    """One SAE on disk: ``path`` is its folder or its file."""

    path: Path
    origin: Origin | None = None
    choices: Choices = Choices()


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """A place as Hugging Face's module tree names it: the input or output of ``module``, relative to the layers' list.

    Which ``Site`` that is depends on the model's architecture (``architectures.site_of``).
    """

    layer: int
    module: str
    side: Literal["in", "out"]

    def __str__(self) -> str:
        inner = f".{self.module}" if self.module else ""
        return f"{self.side}put of layer {self.layer}{inner}"


Place: TypeAlias = Site | ModulePlace


@dataclass(frozen=True, slots=True)
class Convention:
    """One thing that decides what the weights mean, and who says so: a file's key, the format, or the user."""

    name: str
    value: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """An SAE read from disk."""

    dictionary: SparseCoder
    files: tuple[Path, ...]
    """What its digest covers."""
    reads: Place | None
    """Where it reads, if its files say so."""
    writes: tuple[Place, ...] = ()
    """Where it writes; empty where that is the place it reads. Several for one layer of a cross-layer transcoder, whose
    ``W_dec`` then holds the vectors for each place side by side."""
    processing: Processing | None = "none"
    """None where files leave it open and it matters: the user must say."""
    model: str | None = None
    """The model it was trained on, as the files call it."""
    stated_l0: float | None = None
    """Mean number of features that fire on a token, as the files state it."""
    conventions: tuple[Convention, ...] = ()
    used: frozenset[str] = field(default_factory=frozenset)
    """Names of the choices that made a difference."""


class Conventions:
    """Collects conventions while a loader decides."""

    def __init__(self) -> None:
        self._found: list[Convention] = []

    def note(self, name: str, value: object, source: str) -> None:
        """``value`` as people read it."""
        self._found.append(Convention(name, _said(value), source))

    def all(self) -> tuple[Convention, ...]:
        """In the order in which they were decided."""
        return tuple(self._found)


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
