"""The catalogue, the server's facts and its health through both clients."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from saeguard.v1 import catalog_service_pb2 as pb
from saeguard.v1 import server_info_service_pb2 as info_pb
from saeguard_client import FeatureRef, PermissionDenied, Quantile, SaeQuality

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def paged(sizes: list[int]) -> Any:
    """Pages of these sizes; the token is the page's number."""

    def script(request: Any, context: Any) -> Any:
        number = int(request.page_token or 0)
        start = sum(sizes[:number])
        features = [pb.Feature(sae="a", index=i) for i in range(start, start + sizes[number])]
        more = str(number + 1) if number + 1 < len(sizes) else ""
        return pb.ListFeaturesResponse(features=features, next_page_token=more)

    return script


@pytest.mark.parametrize(
    ("sizes", "limit", "expected", "pages"),
    [
        ([2, 0, 3], None, 5, 3),
        ([2, 0, 3], 5, 5, 3),
        ([2, 0, 3], 2, 2, 1),
        ([2, 2], 3, 3, 2),
        ([0], None, 0, 1),
        ([2], 0, 0, 0),
    ],
)
def test_pages_are_one_walk(
    server: Any, shell: Any, sizes: list[int], limit: int | None, expected: int, pages: int
) -> None:
    server.on("ListFeatures", paged(sizes))
    features = list(shell.stream("features", "a", "bridge", limit))
    assert [feature.index for feature in features] == list(range(expected))
    assert len(server.seen) == pages
    assert all((call.request.sae, call.request.query) == ("a", "bridge") for call in server.seen)
    assert all(0 < call.request.page_size <= 100 for call in server.seen)


def test_pages_are_asked_for_as_needed(server: Any, shell: Any) -> None:
    server.on("ListFeatures", paged([2, 2]))
    walk = shell.stream("features")
    assert next(walk).index == 0
    assert len(server.seen) == 1
    walk.close()


def test_a_feature(server: Any, shell: Any) -> None:
    entry = pb.Feature(
        sae="a",
        index=7,
        label="bridges",
        label_metric="auroc",
        label_score=0.5,
        density=0.0,
        quantiles=[pb.Quantile(q=0.5, value=1.5)],
        top_tokens=[pb.PromotedToken(token=" gate", logit=2.0)],
        examples=[pb.FeatureExample(text="the bridge", token_index=1, value=3.0)],
    )
    server.on("GetFeature", pb.GetFeatureResponse(feature=entry))
    feature = shell.call("feature", "a", 7)
    assert (feature.ref, feature.label, feature.label_score) == (FeatureRef("a", 7), "bridges", 0.5)
    assert (feature.density, feature.maximum) == (0.0, None)
    assert feature.quantiles == (Quantile(0.5, 1.5),)
    assert feature.examples[0].token_index == 1
    assert server.seen[0].request == pb.GetFeatureRequest(sae="a", feature=7)


def test_model_saes_and_info(server: Any, shell: Any) -> None:
    server.on("GetModel", pb.GetModelResponse(name="m", num_layers=2, sites=["resid_post.0", "resid_post.1"]))
    server.on("ListSaes", pb.ListSaesResponse(saes=[pb.Sae(name="a"), pb.Sae(name="b", quality=pb.SaeQuality(l0=32))]))
    server.on(
        "GetServerInfo",
        info_pb.GetServerInfoResponse(version="1", intervention_kinds=["zero", "cap"], limits=info_pb.Limits()),
    )
    assert shell.call("model").sites == ("resid_post.0", "resid_post.1")
    first, second = shell.call("saes")
    assert (first.quality, second.quality) == (None, SaeQuality(l0=32.0))
    info = shell.call("info")
    assert (info.intervention_kinds, info.limits.max_slots) == (("zero", "cap"), 0)


@pytest.mark.parametrize(("status", "expected"), [(SERVING, True), (NOT_SERVING, False), (0, False)])
def test_health(server: Any, shell: Any, status: int, expected: bool) -> None:
    server.on("Check", health_pb2.HealthCheckResponse(status=status))
    assert shell.call("healthy", "saeguard.v1.GenerationService") is expected
    assert server.seen[0].request.service == "saeguard.v1.GenerationService"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND])
def test_a_probe_that_is_refused_is_false(server: Any, shell: Any, code: grpc.StatusCode) -> None:
    server.on("Check", lambda request, context: context.abort(code, "no"))
    assert shell.call("healthy") is False


def test_a_probe_that_is_not_allowed_is_an_error(server: Any, shell: Any) -> None:
    server.on("Check", lambda request, context: context.abort(grpc.StatusCode.PERMISSION_DENIED, "no"))
    with pytest.raises(PermissionDenied):
        shell.call("healthy")
