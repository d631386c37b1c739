"""SAEs tied to the sites of a loaded model: where they read and write there, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saeguard_sae.loading import LoadedSae, LoadError, bind, with_settings
from saeguard_sae.models import ModelConfig, Site, locate
from saeguard_server.engine.stock.model import LoadedModel
from saeguard_server.settings import SaeSettings
from saeguard_server.sources import open_source

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_saes(settings: tuple[SaeSettings, ...], model: LoadedModel) -> dict[str, LoadedSae]:
    """The SAEs by name, on the model's device.

    Raises:
        LoadError: one cannot be loaded, names a site that the model lacks, or has another width.
    """
    saes = {one.name: load_sae(one, model) for one in settings}
    _check_widths(model, saes)
    return saes


def load_sae(settings: SaeSettings, model: LoadedModel) -> LoadedSae:
    """One SAE as the settings ask for it, at its sites in this model; its width is not yet compared.

    Raises:
        LoadError: it cannot be loaded, or names a site that the model lacks.
    """
    source = open_source(settings)
    sae = bind(source.sae, model.network, model.network.config, source.overrides)
    own = {} if settings.dtype == "float32" else {"dtype": settings.dtype}
    moved = sae.dictionary.to(model.device, _DTYPES[settings.dtype])
    return replace(sae, dictionary=moved, digest=with_settings(sae.digest, own))


def _check_widths(model: LoadedModel, saes: dict[str, LoadedSae]) -> None:
    """Reads one token and compares every site's width with its SAEs'."""
    used = {site for sae in saes.values() for site in (sae.site, *sae.write_sites)}
    widths = measure_widths(model.network, model.network.config, used, model.device)
    for sae in saes.values():
        sizes = [(sae.site, "d_in", sae.dictionary.d_in)]
        sizes += [(site, "d_out", sae.write_width) for site in sae.writes]
        for site, name, size in sizes:
            if widths[site] != size:
                raise LoadError(f"SAE {sae.name!r} has {name} {size}, but {site} of this model is {widths[site]} wide")


def measure_widths(
    model: nn.Module, config: ModelConfig, sites: Iterable[Site], device: torch.device
) -> dict[Site, int]:
    """How wide the activations at these sites are, found by reading one token."""
    found: dict[Site, int] = {}
    handles = []
    for site in sites:

        def see(_: nn.Module, args: Any, out: Any = None, site: Site = site) -> None:
            value = args if out is None else out
            found[site] = (value if isinstance(value, Tensor) else value[0]).shape[-1]

        where = locate(model, config, site)
        register = where.module.register_forward_pre_hook if where.side == "in" else where.module.register_forward_hook
        handles.append(register(see))
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
