"""The model, SAEs and features as messages."""

from __future__ import annotations

from saeguard.v1 import catalog_service_pb2 as pb
from saeguard_sae.catalogue import CatalogueFeature, Quality
from saeguard_sae.loading import LoadedSae
from saeguard_server.catalog import FeaturePage, ListedFeature
from saeguard_server.engine.protocol import Capabilities, ModelInfo


def model_response(model: ModelInfo, capabilities: Capabilities) -> pb.GetModelResponse:
    """The model, and the sites that the engine reaches, from the first layer to the last."""
    return pb.GetModelResponse(
        name=model.name,
        architecture=model.architecture,
        digest=model.digest,
        num_layers=model.num_layers,
        d_model=model.d_model,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        dtype=model.dtype,
        has_chat_template=model.has_chat_template,
        sites=[str(site) for site in sorted(capabilities.sites)],
    )


def sae(loaded: LoadedSae) -> pb.Sae:
    """One SAE."""
    quality, measured = loaded.catalogue.quality, loaded.measured
    return pb.Sae(
        name=loaded.name,
        site=str(loaded.site),
        d_in=loaded.dictionary.d_in,
        d_sae=loaded.dictionary.d_sae,
        architecture=loaded.dictionary.architecture,
        digest=loaded.digest,
        quality=None if quality is None else _quality(quality),
        num_labelled=sum(bool(one.label) for one in loaded.catalogue.features.values()),
        write_sites=[str(site) for site in loaded.write_sites],
        format=loaded.format,
        conventions=[pb.SaeConvention(name=one.name, value=one.value, source=one.source) for one in loaded.conventions],
        measured=None if measured is None else _quality(measured),
    )


def page_response(page: FeaturePage) -> pb.ListFeaturesResponse:
    """One page of features."""
    return pb.ListFeaturesResponse(
        features=[feature(one) for one in page.features], next_page_token=page.next_page_token
    )


def feature(listed: ListedFeature) -> pb.Feature:
    """One feature; what is not known stays unset."""
    known = listed.entry
    return pb.Feature(
        sae=listed.sae,
        index=known.index,
        label=known.label or "",
        label_score=known.label_score,
        label_metric=known.label_metric or "",
        maximum=known.maximum,
        quantiles=_quantiles(known),
        density=known.density,
        top_tokens=[pb.PromotedToken(token=one.token, logit=one.logit) for one in known.top_tokens],
        examples=[
            pb.FeatureExample(text=one.text, token_index=one.token_index, value=one.value) for one in known.examples
        ],
    )


def _quantiles(known: CatalogueFeature) -> list[pb.Quantile]:
    pairs = sorted((float(q), value) for q, value in known.quantiles.items())
    return [pb.Quantile(q=q, value=value) for q, value in pairs]


def _quality(known: Quality) -> pb.SaeQuality:
    return pb.SaeQuality(
        l0=known.l0,
        fvu=known.fvu,
        ce_base=known.ce_base,
        ce_spliced=known.ce_spliced,
        ce_mean_ablated=known.ce_mean_ablated,
        dead_share=known.dead_share,
        tokens=known.tokens,
    )
