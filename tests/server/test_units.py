"""A value means what it meant where it was read: raw, a share of the maximum, or a dashboard's folded value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from saeguard.types import Add, Cap, Clamp, Floor, Intervention
from saeguard_sae.catalogue import CatalogueFeature, write_catalogue
from saeguard_server.engine.transformers import TransformersEngine, load_engine
from saeguard_server.errors import InvalidRequest
from saeguard_server.observe import Metrics
from saeguard_server.steering import TokenRange, compile_steering
from support.engines import make_world

TOKENS = (256, 1, 2, 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    world = make_world("gpt2", tmp_path_factory.mktemp("gpt2"))
    write_catalogue(Path(world.path / "resid_post"), {4: CatalogueFeature(index=4, maximum=8.0)})
    settings = msgspec.structs.replace(world.settings())
    return load_engine(settings, Metrics(CollectorRegistry()))


def affine(engine: TransformersEngine, kind: Intervention, sae: str = "resid_post", feature: int = 4) -> list[float]:
    steering = compile_steering(
        engine, (replace(kind, sae=sae, feature=feature),), None, TokenRange(TOKENS, 8, frozenset())
    )
    return list(steering.edits[0].affine)


@pytest.mark.parametrize("kind", [Clamp, Add, Cap, Floor])
def test_a_folded_value_is_divided_by_the_rows_norm(kind: type[Clamp], engine: TransformersEngine) -> None:
    for sae in ("resid_post", "resid_pre", "mlp_out"):
        norm = float(engine.saes[sae].dictionary.W_dec[4].norm())
        assert not 0.9 < norm < 1.1
        assert affine(engine, kind(sae, 4, 6.0, unit="unit_decoder"), sae) == pytest.approx(
            affine(engine, kind(sae, 4, 6.0 / norm), sae)
        )


def test_a_share_of_the_maximum(engine: TransformersEngine) -> None:
    assert affine(engine, Clamp("mid", 2, 0.5, unit="max")) == affine(engine, Clamp("mid", 2, 4.0))
    with pytest.raises(InvalidRequest, match=r"interventions\[0\].clamp.unit.*no maximum"):
        affine(engine, Clamp("mid", 2, 0.5, unit="max"), feature=5)
