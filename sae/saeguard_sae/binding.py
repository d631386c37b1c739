"""Ties an SAE to the model it is served with: its sites found, the model's own conventions applied, widths compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig, depth, norm_gain, site_of, sites
from saeguard_sae.coder import SparseCoder
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats.found import Convention, Found, ModulePlace, Place, Processing
from saeguard_sae.loading import LoadedSae, LoadError, OpenedSae, with_settings
from saeguard_sae.normalisation import Normalisation
from saeguard_sae.processing import as_unprocessed, matters
from saeguard_sae.site import Site
from saeguard_sae.temporal import Temporal

USER = "the settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the user says about an SAE against, or beyond, what its files say; None is what the files say."""

    site: Site | None = None
    write_site: Site | None = None
    apply_b_dec_to_input: bool | None = None
    normalize_activations: Normalisation | None = None
    processing: Processing | None = None


def bind(opened: OpenedSae, model: nn.Module, config: ModelConfig, overrides: Overrides | None = None) -> LoadedSae:
    """The SAE at its sites in this model, in float32 on the CPU.

    Raises:
        LoadError: no site is known, the model lacks it, it writes before it reads, or an override cannot apply.
    """
    said = overrides or Overrides()
    try:
        dictionary, notes = _overridden(opened.found.dictionary, said)
        site = _place(said.site or opened.found.reads, config, "site")
        writes = _writes(opened.found, said, config)
        processing = _processing(opened.found, said, dictionary, site, config)
        if isinstance(dictionary, Dictionary):
            dictionary, site = as_unprocessed(dictionary, site, processing, model, config)
        elif processing != "none":
            raise ValueError(f"processing: {dictionary.architecture} SAEs of processed models are not supported")
        writes, gain = _past_the_norm(site, writes, model, config)
        _check_sites(site, writes, dictionary, config)
    except ValueError as err:
        raise LoadError(f"SAE {opened.name!r}: {err}") from err
    notes += _site_notes(said, opened.found, site, writes, processing)
    return LoadedSae(
        name=opened.name,
        site=site,
        dictionary=dictionary,
        digest=with_settings(opened.digest, _meaning(said)),
        catalogue=opened.catalogue,
        writes=writes,
        write_gain=gain,
        format=opened.format,
        conventions=(*opened.found.conventions, *notes),
        stated_l0=opened.found.stated_l0,
    )


def _meaning(said: Overrides) -> dict[str, object]:
    """What the user says about the weights; its sites are part of every receipt anyway."""
    names = ("apply_b_dec_to_input", "normalize_activations", "processing")
    return {name: value for name in names if (value := getattr(said, name)) is not None}


def _overridden(coder: SparseCoder, said: Overrides) -> tuple[SparseCoder, list[Convention]]:
    notes = []
    for name, field in (("apply_b_dec_to_input", "centre"), ("normalize_activations", "normalisation")):
        value = getattr(said, name)
        if value is None:
            continue
        if isinstance(coder, Temporal):
            raise ValueError(f"{name}: a {coder.architecture} SAE leaves no such choice")
        coder = replace(coder, **{field: value})
        notes.append(Convention(name, {True: "yes", False: "no"}.get(value, str(value)), USER))
    return coder, notes


def _processing(found: Found, said: Overrides, coder: SparseCoder, site: Site, config: ModelConfig) -> Processing:
    processing = said.processing or found.processing
    if processing is not None:
        return processing
    if isinstance(coder, Dictionary) and matters(coder, site, config):
        raise ValueError(
            f"its files do not say whether TransformerLens had changed the model it was trained on, which matters at "
            f"{site}; give the processing: transformer_lens (its defaults), centred, or none"
        )
    return "none"


def _place(place: Place | None, config: ModelConfig, setting: str) -> Site:
    if place is None:
        raise ValueError(f"its files do not say where in the model it belongs; give the {setting}")
    if isinstance(place, ModulePlace):
        return site_of(config.model_type, place.layer, place.module, place.side)
    return place


def _writes(found: Found, said: Overrides, config: ModelConfig) -> tuple[Site, ...]:
    """Where it writes; empty for the place it reads."""
    if said.write_site is not None:
        if len(found.writes) > 1:
            raise ValueError(f"write_site: it writes at {len(found.writes)} sites, which its files name")
        return (said.write_site,)
    writes = tuple(_place(one, config, "write_site") for one in found.writes)
    if not writes and isinstance(found.dictionary, Dictionary) and found.dictionary.is_transcoder:
        raise ValueError("its files do not say where it writes; give the write_site")
    return writes


def _past_the_norm(
    site: Site, writes: tuple[Site, ...], model: nn.Module, config: ModelConfig
) -> tuple[tuple[Site, ...], Tensor | None]:
    """What the norm makes before its gain is no module's output: it is edited behind the gain, times the gain."""
    written = writes or (site,)
    if all(one.point != "mlp_normalized" for one in written):
        return writes, None
    if len(written) > 1:
        raise ValueError("writing before a norm's gain at one of several sites is not supported")
    layer = written[0].layer
    return (Site(layer, "mlp_in"),), norm_gain(model, config, layer)


def _check_sites(site: Site, writes: tuple[Site, ...], coder: SparseCoder, config: ModelConfig) -> None:
    known = sites(config)
    for one in (site, *writes):
        if one not in known:
            raise ValueError(f"{one} is not a site of this {config.model_type} model")
        if depth(one) < depth(site):
            raise ValueError(f"it reads at {site} and cannot write at {one}, which comes before")
    if coder.d_out % max(len(writes), 1):
        raise ValueError(f"its decoder rows are {coder.d_out} wide, which {len(writes)} sites cannot share equally")


def _site_notes(
    said: Overrides, found: Found, site: Site, writes: tuple[Site, ...], processing: Processing
) -> list[Convention]:
    """What is not among the files' own conventions: the user's word, and what became of a place in this model."""
    notes = []
    if said.site is not None or site != found.reads:
        notes.append(Convention("site", str(site), USER if said.site else f"this model: {found.reads}"))
    if writes and (said.write_site is not None or writes != found.writes):
        written = ", ".join(map(str, found.writes)) or str(found.reads)
        notes.append(
            Convention("writes", ", ".join(map(str, writes)), USER if said.write_site else f"this model: {written}")
        )
    if said.processing is not None:
        notes.append(Convention("processing", processing, USER))
    return notes
