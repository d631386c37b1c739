"""The SAEs of a configuration, once the model has told how wide its sites are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from saeguard_sae.formats import saelens_save
from saeguard_sae.site import Site
from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.parallel.mesh import ALONE, Mesh
from saeguard_sae.train.parallel.parts import check_parts
from saeguard_sae.train.run.config import RunConfig
from saeguard_sae.train.run.errors import BadConfig
from saeguard_sae.train.run.estimate import Size
from saeguard_sae.train.settings import SaeSettings

_REHEARSED = 16
"""Features of the SAE that stands in for one before it is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One SAE that is to be trained."""

    name: str
    reads: Site
    writes: Site | None
    """Of a transcoder."""
    size: Size

    @property
    def settings(self) -> SaeSettings:
        """What its learner is made from."""
        return self.size.settings


def plans(config: RunConfig, widths: Mapping[Site, int], mesh: Mesh = ALONE) -> tuple[Plan, ...]:
    """Every SAE of the configuration.

    Raises:
        BadConfig: settings that do not fit the widths, or the processes that share the work; named.
    """
    found = []
    for entry in config.saes:
        d_in = widths[entry.reads]
        d_out = d_in if entry.writes is None else widths[entry.writes]
        try:
            settings = entry.sized(d_in, config.steps, config.stream.batch)
            check_parts(settings, mesh)
        except ValueError as err:
            raise BadConfig(f"saes.{entry.name}: {err}") from err
        size = Size(settings=settings, d_in=d_in, d_out=d_out)
        found.append(Plan(name=entry.name, reads=entry.reads, writes=entry.writes, size=size))
    return tuple(found)


def rehearse_export(plan: Plan, sample: Mapping[Site, Tensor], model_name: str) -> None:
    """Writes a small untrained SAE of the same kind, so that what the format cannot hold shows before work is done.

    Args:
        sample: activations [tokens, width] at its sites.

    Raises:
        BadConfig: the format has no way to say it.
    """
    small = replace(plan.settings, d_sae=_REHEARSED, k=min(plan.settings.k, 1), widths=(), steps=1, kernels="torch")
    wanted = None if plan.writes is None else sample[plan.writes]
    with TemporaryDirectory() as folder:
        try:
            dictionary = make_learner(small, sample[plan.reads], wanted).export()
            writes = () if plan.writes is None else (plan.writes,)
            saelens_save.save(dictionary, Path(folder), site=plan.reads, model_name=model_name, writes=writes)
        except ValueError as err:
            raise BadConfig(f"saes.{plan.name}: its SAE could not be written: {err}") from err
