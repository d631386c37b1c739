"""CatalogService: the model, its SAEs, their features."""

from __future__ import annotations

import asyncio

from saeguard.v1 import catalog_service_pb2 as catalog_pb
from saeguard.v1.catalog_service_pb2_grpc import CatalogServiceServicer
from saeguard_server.edge.wire import catalog as catalog_wire
from saeguard_server.engine.protocol import Capabilities, ModelInfo
from saeguard_server.flows.catalog import Catalog


class CatalogServicer(CatalogServiceServicer):
    """Looks things up."""

    def __init__(self, catalog: Catalog, model: ModelInfo, capabilities: Capabilities) -> None:
        self._catalog = catalog
        self._model = catalog_wire.model_response(model, capabilities)
        self._saes = catalog_pb.ListSaesResponse(saes=[catalog_wire.sae(one) for one in catalog.saes()])

    async def GetModel(self, request: catalog_pb.GetModelRequest, context: object) -> catalog_pb.GetModelResponse:
        """The served model."""
        return self._model

    async def ListSaes(self, request: catalog_pb.ListSaesRequest, context: object) -> catalog_pb.ListSaesResponse:
        """Every SAE."""
        return self._saes

    async def GetFeature(self, request: catalog_pb.GetFeatureRequest, context: object) -> catalog_pb.GetFeatureResponse:
        """One feature."""
        found = self._catalog.feature(request.sae, request.feature)
        return catalog_pb.GetFeatureResponse(feature=catalog_wire.feature(found))

    async def ListFeatures(
        self, request: catalog_pb.ListFeaturesRequest, context: object
    ) -> catalog_pb.ListFeaturesResponse:
        """A page of features."""
        # In a thread: words are looked for in every example of every feature.
        page = await asyncio.to_thread(
            self._catalog.features, request.sae, request.query, request.page_size, request.page_token
        )
        return catalog_wire.page_response(page)
