"""CatalogService, ServerInfoService and grpc.health.v1: small questions about what is served."""

from __future__ import annotations

from google.protobuf import wrappers_pb2

from saeguard.v1 import catalog_service_pb2 as pb
from saeguard.v1 import server_info_service_pb2 as info_pb
from saeguard_client import _checks
from saeguard_client._wire.mirror import decode, read
from saeguard_client.calls import Page, PagedCall, PerCall, UnaryCall
from saeguard_client.catalog import Feature, FeatureRef, Model, Sae, ServerInfo

_CATALOG = pb.DESCRIPTOR.services_by_name["CatalogService"].full_name
_INFO = info_pb.DESCRIPTOR.services_by_name["ServerInfoService"].full_name
_PAGE = 100
_SERVING = 1


def model(options: PerCall) -> UnaryCall[Model]:
    """GetModel."""
    asked = pb.GetModelRequest().SerializeToString()
    return UnaryCall(
        f"/{_CATALOG}/GetModel", asked, lambda data: read(Model, decode(pb.GetModelResponse, data)), options
    )


def saes(options: PerCall) -> UnaryCall[tuple[Sae, ...]]:
    """ListSaes."""
    asked = pb.ListSaesRequest().SerializeToString()
    return UnaryCall(f"/{_CATALOG}/ListSaes", asked, _saes, options)


def feature(ref: FeatureRef, options: PerCall) -> UnaryCall[Feature]:
    """GetFeature."""
    asked = pb.GetFeatureRequest(sae=ref.sae, feature=ref.feature).SerializeToString()
    return UnaryCall(
        f"/{_CATALOG}/GetFeature",
        asked,
        lambda data: read(Feature, decode(pb.GetFeatureResponse, data).feature),
        options,
    )


def features(sae: str | None, query: str, limit: int | None, options: PerCall) -> PagedCall[Feature]:
    """ListFeatures, page by page."""
    filters = {"sae": "" if sae is None else _checks.text("sae", sae), "query": _checks.text("query", query)}

    def ask(token: str, left: int | None) -> UnaryCall[Page[Feature]]:
        size = _PAGE if left is None else min(left, _PAGE)
        asked = pb.ListFeaturesRequest(**filters, page_size=size, page_token=token).SerializeToString()
        return UnaryCall(f"/{_CATALOG}/ListFeatures", asked, _page, options)

    return PagedCall(ask, None if limit is None else _checks.whole("limit", limit))


def info(options: PerCall) -> UnaryCall[ServerInfo]:
    """GetServerInfo."""
    asked = info_pb.GetServerInfoRequest().SerializeToString()
    return UnaryCall(
        f"/{_INFO}/GetServerInfo",
        asked,
        lambda data: read(ServerInfo, decode(info_pb.GetServerInfoResponse, data)),
        options,
    )


def health(service: str, options: PerCall) -> UnaryCall[bool]:
    """grpc.health.v1 Check. Its two messages are a string and an enum in field 1, as these wrappers are.

    Its own stubs are a package that the thin client does not need.
    """
    asked = wrappers_pb2.StringValue(value=_checks.text("service", service)).SerializeToString()
    return UnaryCall(
        "/grpc.health.v1.Health/Check",
        asked,
        lambda data: decode(wrappers_pb2.Int32Value, data).value == _SERVING,
        options,
    )


def _saes(data: bytes) -> tuple[Sae, ...]:
    return tuple(read(Sae, sae) for sae in decode(pb.ListSaesResponse, data).saes)


def _page(data: bytes) -> Page[Feature]:
    reply = decode(pb.ListFeaturesResponse, data)
    return Page(tuple(read(Feature, one) for one in reply.features), reply.next_page_token)
