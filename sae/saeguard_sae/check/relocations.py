"""The other places that an SAE may belong to, nearest first: the neighbouring layers, this layer's other points."""

from __future__ import annotations

from collections.abc import Iterator

from saeguard_sae.architectures import ModelConfig, depth, sites
from saeguard_sae.check import stated
from saeguard_sae.check.changes import Change, Setup
from saeguard_sae.check.measure import is_transcoder, target
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats.found import Processing
from saeguard_sae.loading import LoadedSae
from saeguard_sae.processing import matters
from saeguard_sae.site import Site


def relocations(sae: LoadedSae, config: ModelConfig) -> list[Change]:
    """The changes of site; whether an activation there is as wide as the SAE, only the model tells."""
    own = target(sae)
    if own is None:
        return [_reads(sae, site, None, config) for site in _others(sae, sae.site, config)]
    if not is_transcoder(sae):
        return [_reads(sae, site, site, config) for site in _others(sae, sae.site, config)]
    found = [_moved(sae, own, *both, config) for both in _both(sae.site, own, config)]
    found += [_reads(sae, site, own, config) for site in _others(sae, sae.site, config) if depth(site) <= depth(own)]
    return found + [_writes(sae, own, site) for site in _others(sae, own, config) if depth(site) >= depth(sae.site)]


def _others(sae: LoadedSae, here: Site, config: ModelConfig) -> Iterator[Site]:
    """The same point in layers near by, the other points of this layer, the same point in layers further off."""
    same, own = _same_point(here, config), stated.processing(sae)
    found = [*same[:2], *sorted((one for one in sites(config) if one.layer == here.layer), key=depth), *same[2:]]
    return (site for site in found if site != here and _binds_alike(own, here, site))


def _same_point(here: Site, config: ModelConfig) -> list[Site]:
    """In the other layers, by distance."""
    found = [one for one in sites(config) if one.point == here.point and one != here]
    return sorted(found, key=lambda one: (abs(one.layer - here.layer), one.layer))


def _both(reads: Site, writes: Site, config: ModelConfig) -> Iterator[tuple[Site, Site]]:
    """Reading and writing moved by as many layers."""
    known = sites(config)
    for moved in _same_point(reads, config):
        layer = writes.layer + moved.layer - reads.layer
        if layer >= 0 and (other := Site(layer, writes.point)) in known:
            yield moved, other


def _binds_alike(processing: Processing | None, here: Site, there: Site) -> bool:
    """Whether an SAE of a processed model has the same weights at both: what is folded in depends on the site."""
    if processing in (None, "none"):
        return True
    if here.point == there.point:
        return here.point != "attn_z"
    points = {here.point, there.point}
    return points == {"mlp_normalized", "mlp_in"} or all(point.startswith("resid") for point in points)


def _read_setting(sae: LoadedSae, site: Site, config: ModelConfig) -> str:
    """The settings by which it reads there, by the conventions that it has here."""
    said, own = f'site = "{site}"', stated.processing(sae)
    is_open = own is None and isinstance(sae.dictionary, Dictionary) and matters(sae.dictionary, site, config)
    # What is an MLP's input to a processed model is another site of this one.
    is_plain = own == "transformer_lens" and site.point == "mlp_in"
    return f'{said}\nprocessing = "none"' if is_open or is_plain else said


def _reads(sae: LoadedSae, site: Site, wanted: Site | None, config: ModelConfig) -> Change:
    what = f"it reads {site}, not {sae.site}"
    return Change("site", what, _read_setting(sae, site, config), lambda setup: Setup(site, wanted, setup.reader))


def _writes(sae: LoadedSae, own: Site, site: Site) -> Change:
    what = f"it writes {site}, not {own}"
    return Change("site", what, f'write_site = "{site}"', lambda setup: setup._replace(target=site))


def _moved(sae: LoadedSae, own: Site, site: Site, wanted: Site, config: ModelConfig) -> Change:
    what = f"it reads {site} and writes {wanted}, not {sae.site} and {own}"
    setting = f'{_read_setting(sae, site, config)}\nwrite_site = "{wanted}"'
    return Change("site", what, setting, lambda setup: Setup(site, wanted, setup.reader))
