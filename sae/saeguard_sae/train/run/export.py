"""Trained SAEs as files: SAELens' format, which our server and SAELens load, and a card."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats import saelens_save
from saeguard_sae.train.run.card import card
from saeguard_sae.train.run.config import RunConfig
from saeguard_sae.train.run.errors import RunFailed
from saeguard_sae.train.run.folder import RunFolder
from saeguard_sae.train.run.metrics import last_figures
from saeguard_sae.train.run.plans import Plan
from saeguard_sae.train.run.source import Source

CARD = "README.md"


def export(dictionary: Dictionary, plan: Plan, config: RunConfig, folder: RunFolder, source: Source) -> Path:
    """Writes one trained SAE with its card; its folder.

    Raises:
        RunFailed: it could not be written, or holds values that are not finite.
    """
    path = folder.sae(plan.name)
    try:
        saelens_save.save(
            dictionary,
            path,
            site=plan.reads,
            model_name=source.model_name,
            metadata=_metadata(config, source),
            writes=() if plan.writes is None else (plan.writes,),
        )
        figures = last_figures(folder.metrics)[plan.name]
        part = path / f"{CARD}.part"
        part.write_text(card(plan, config, source.model_name, source.epoch, figures), encoding="utf-8")
        os.replace(part, path / CARD)
    except (OSError, ValueError, RuntimeError) as err:
        raise RunFailed(f"saes.{plan.name}: could not be written to {path}: {err}") from err
    return path


def _metadata(config: RunConfig, source: Source) -> dict[str, Any]:
    """What SAELens' files have a place for, and what made them."""
    known: dict[str, Any] = {
        "training_tokens": config.steps * config.stream.batch,
        "dataset_path": config.data.path,
        "saeguard_version": version("saeguard"),
    }
    if source.context is not None:
        known |= {"context_size": source.context, "prepend_bos": source.has_bos}
    return known
