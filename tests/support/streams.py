"""Small models and texts for the tests of training, and what is in the models by plain hooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.models import Site
from saeguard_sae.train.data import LanguageModel, open_language_model
from saeguard_sae.train.settings import LanguageModelSettings
from support.models import SITES, save_model


def small_model(path: Path, model_type: str = "llama") -> LanguageModel:
    """A random model, through its files."""
    save_model(model_type, path)
    return open_language_model(LanguageModelSettings(path=str(path)))


def texts(count: int, seed: int, longest: int = 80) -> list[str]:
    """Documents of 1 to ``longest`` letters and spaces, each another one."""
    random = Random(seed)
    return [
        f"{number} " + "".join(random.choices("abcdefgh ijklmnop ", k=random.randint(1, longest)))
        for number in range(count)
    ]


def blank_line_file(path: Path, documents: Sequence[str]) -> Path:
    """A plain file with a blank line between documents."""
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def plain_activations(model: Any, model_type: str, site: Site, ids: Tensor) -> Tensor:
    """[rows, context, width] at a site of a Hugging Face model, by a hook on the module that the tests' table names."""
    path, side = SITES[model_type][site.point]
    module = model.get_submodule(path.replace(".1", f".{site.layer}"))
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        seen.append((value if isinstance(value, Tensor) else value[0]).clone())

    if side == "out":
        handle = module.register_forward_hook(lambda _, __, out: keep(out))
    else:
        handle = module.register_forward_pre_hook(lambda _, args: keep(args))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]
