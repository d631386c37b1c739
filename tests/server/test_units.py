"""A value means what it meant where it was read: raw, a share of the maximum, or a dashboard's folded value."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from saeguard_sae.catalogue import CatalogueFeature, write_catalogue
from saeguard_sae.edits import Add, Cap, Clamp, Edit, Floor
from saeguard_server.engine.transformers import TransformersEngine, load_engine
from saeguard_server.errors import InvalidRequest
from saeguard_server.observe import Metrics
from saeguard_server.steering import TokenRange, resolve_steering
from support.engines import edit, make_world

TOKENS = (256, 1, 2, 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    world = make_world("gpt2", tmp_path_factory.mktemp("gpt2"))
    write_catalogue(Path(world.path / "resid_post"), {4: CatalogueFeature(index=4, maximum=8.0)})
    settings = msgspec.structs.replace(world.settings())
    return load_engine(settings, Metrics(CollectorRegistry()))


def affine(engine: TransformersEngine, kind: Edit, sae: str = "resid_post", feature: int = 4) -> list[float]:
    steering = resolve_steering(engine, (edit(sae, feature, kind),), None, TokenRange(TOKENS, 8, frozenset()))
    return list(steering.edits[0].affine)


@pytest.mark.parametrize("kind", [Clamp, Add, Cap, Floor])
def test_a_folded_value_is_divided_by_the_rows_norm(kind: type[Clamp], engine: TransformersEngine) -> None:
    for sae in ("resid_post", "resid_pre", "mlp_out"):
        norm = float(engine.saes[sae].dictionary.W_dec[4].norm())
        assert not 0.9 < norm < 1.1
        assert affine(engine, kind(6.0, "unit_decoder"), sae) == pytest.approx(affine(engine, kind(6.0 / norm), sae))


def test_a_share_of_the_maximum(engine: TransformersEngine) -> None:
    assert affine(engine, Clamp(0.5, "max")) == affine(engine, Clamp(4.0))
    with pytest.raises(InvalidRequest, match=r"interventions\[0\].clamp.unit.*no maximum"):
        affine(engine, Clamp(0.5, "max"), feature=5)
