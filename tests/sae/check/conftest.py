"""Small models with texts, their activations by plain hooks, and SAEs made to fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard_sae.catalogue import Catalogue
from saeguard_sae.coders import Temporal
from saeguard_sae.dictionary import Dictionary, JumpReLU
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site
from support.models import BOS, EOS, PAD, SITES, save_model

SPECIAL = frozenset({BOS, EOS, PAD})


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@dataclass(frozen=True)
class World:
    """A model, what it reads, and what is at its sites."""

    model_type: str
    model: Any
    texts: list[Tensor]
    special: frozenset[int] = SPECIAL

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def ordinary(self, ids: Tensor) -> Tensor:
        """bool [T]"""
        return torch.tensor([int(one) not in self.special for one in ids])

    def module(self, site: Site) -> tuple[Any, str]:
        """The module of a site by the tests' own table, and its side."""
        path, side = SITES[self.model_type][site.point]
        return self.model.get_submodule(path.replace(".1", f".{site.layer}")), side

    def hook(self, site: Site, visit: Callable[[Tensor], Tensor | None]) -> Any:
        """A plain hook: visit(x [1, T, width]) -> what takes its place, or None."""
        module, side = self.module(site)

        def visited(value: Any) -> Any:
            x = value if isinstance(value, Tensor) else value[0]
            new = visit(x)
            if new is None:
                return None
            return new if isinstance(value, Tensor) else (new, *value[1:])

        if side != "out":
            return module.register_forward_pre_hook(lambda _, args: visited(args))
        return module.register_forward_hook(lambda _, __, out: visited(out))

    def activations(self, site: Site) -> list[Tensor]:
        """What is at the site, [T, width] of each text."""
        found: list[Tensor] = []
        handle = self.hook(site, lambda x: found.append(x[0].clone()))
        with torch.no_grad():
            for ids in self.texts:
                self.model(input_ids=ids[None])
        handle.remove()
        return found

    def rows(self, site: Site) -> Tensor:
        """[n, width] of the ordinary tokens, float64."""
        texts = zip(self.activations(site), self.texts, strict=True)
        return torch.cat([x[self.ordinary(ids)] for x, ids in texts]).double()

    def loss(self) -> float:
        """Mean next-token cross-entropy in float64, with whatever hooks there are."""
        nats = []
        with torch.no_grad():
            for ids in self.texts:
                scores = self.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                nats.append(-scores[:-1].gather(1, ids[1:, None])[:, 0])
        return float(torch.cat(nats).mean())


def texts(seed: int) -> list[Tensor]:
    """BOS and some bytes, four times; one of them holds an EOS in the middle."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(0, 256, (length,), generator=generator) for length in (70, 41, 90, 60)]
    found[1][20] = EOS
    return [torch.cat([torch.tensor([BOS]), one]) for one in found]


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """By model type; biases and gains are not the 0 and 1 of fresh models."""
    made: dict[str, World] = {}

    def world(model_type: str) -> World:
        if model_type not in made:
            path: Path = tmp_path_factory.mktemp(model_type)
            model = save_model(model_type, path)
            generator = torch.Generator().manual_seed(77)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
            made[model_type] = World(model_type, model, texts(5))
        return made[model_type]

    return world


@pytest.fixture(scope="session")
def fitted() -> Callable[..., Dictionary]:
    """Makes SAEs that fit."""
    return _fitted


def _fitted(x: Tensor, *, target: Tensor | None = None, offset: float = 1.0, alike: float = 0.8) -> Dictionary:
    """x [n, d] -> an SAE that knows these activations and no others: a feature for each, besides those much alike.

    Args:
        target: what it must reproduce where that is not x: a transcoder then, as good as least squares make it.
        offset: ``b_dec`` is this many mean norms of x away from 0, in a direction of no meaning.
        alike: cosine from which two activations share a feature, and of which a feature fires.
    """
    x = x.double()
    direction = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    b_dec = offset * x.norm(dim=1).mean() * direction / direction.norm()
    own = _unlike(x - b_dec, alike)
    unit = own / own.norm(dim=1, keepdim=True)
    threshold = alike * own.norm(dim=1)
    pre = (x - b_dec) @ unit.T
    features, b_enc = pre * (pre > threshold), torch.zeros(len(own)).double()
    if target is None:
        W_dec = _regressed(features, x - b_dec)
    else:
        b_enc, b_dec = -b_dec @ unit.T, target.double().mean(0)
        W_dec = _regressed(features, target.double() - b_dec)
    return Dictionary(
        W_enc=unit.T.float(),
        b_enc=b_enc.float(),
        W_dec=W_dec.float(),
        b_dec=b_dec.float(),
        activation=JumpReLU(threshold.float()),
        centre=target is None,
        is_transcoder=target is not None,
    )


def _unlike(rows: Tensor, alike: float) -> Tensor:
    """Rows of which no two have a larger cosine."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    kept: list[int] = []
    for at in range(len(rows)):
        if not kept or float((unit[kept] @ unit[at]).max()) < alike:
            kept.append(at)
    return rows[kept]


def _regressed(features: Tensor, target: Tensor) -> Tensor:
    """A row for each feature, by ridge regression."""
    square = features.T @ features
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square)).double()
    solved: Tensor = torch.linalg.solve(square + ridge, features.T @ target)
    return solved


@pytest.fixture(scope="session")
def loaded() -> Callable[..., LoadedSae]:
    """Puts a dictionary at a site."""

    def at(site: Site, dictionary: Any, **more: Any) -> LoadedSae:
        return LoadedSae("one", site, dictionary, "0" * 64, Catalogue(), **more)

    return at


@pytest.fixture(scope="session")
def temporal() -> Temporal:
    """A random temporal SAE."""
    generator = torch.Generator().manual_seed(32)

    def normal(*shape: int, by: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=generator) * by

    shapes = {"k_ctx": (12, 24), "q_target": (12, 24), "v_ctx": (24, 24), "c_proj": (24, 24)}
    layer = {f"{name}.weight": normal(*shape) for name, shape in shapes.items()}
    rows = normal(24, 48)
    return Temporal(rows.T.contiguous(), rows, normal(48), (layer,), n_heads=2, k=None, scale=3.0)
