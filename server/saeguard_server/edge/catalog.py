"""CatalogService: the model, its SAEs, their features."""

from __future__ import annotations

import asyncio

from saeguard.v1 import catalog_service_pb2 as pb
from saeguard.v1.catalog_service_pb2_grpc import CatalogServiceServicer
from saeguard_server.edge.wire import catalog as wire
from saeguard_server.engine.protocol import Capabilities, ModelInfo
from saeguard_server.flows.catalog import Catalog


class CatalogServicer(CatalogServiceServicer):
    """Looks things up."""

    def __init__(self, catalog: Catalog, model: ModelInfo, capabilities: Capabilities) -> None:
        self._catalog = catalog
        self._model = wire.model_response(model, capabilities)
        self._saes = pb.ListSaesResponse(saes=[wire.sae(one) for one in catalog.saes()])

    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:
        """The served model."""
        return self._model

    async def ListSaes(self, request: pb.ListSaesRequest, context: object) -> pb.ListSaesResponse:
        """Every SAE."""
        return self._saes

    async def GetFeature(self, request: pb.GetFeatureRequest, context: object) -> pb.GetFeatureResponse:
        """One feature."""
        found = self._catalog.feature(request.sae, request.feature)
        return pb.GetFeatureResponse(feature=wire.feature(found))

    async def ListFeatures(self, request: pb.ListFeaturesRequest, context: object) -> pb.ListFeaturesResponse:
        """A page of features."""
        # In a thread: words are looked for in every example of every feature.
        page = await asyncio.to_thread(
            self._catalog.features, request.sae, request.query, request.page_size, request.page_token
        )
        return wire.page_response(page)
