"""The card of a trained SAE: what it is, what it learnt from, how it did, how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import msgspec

from saeguard_sae.train.run.config import RunConfig
from saeguard_sae.train.run.plans import Plan


def card(plan: Plan, config: RunConfig, model_name: str, epoch: int, figures: Mapping[str, Any]) -> str:
    """Markdown, with the header that the Hugging Face hub reads.

    Args:
        epoch: how often the data was started again.
        figures: the last line of metrics.
    """
    parts = [
        _head(plan, model_name),
        _use(plan, config),
        _data(config, epoch),
        _figures(figures, config),
        _settings(plan),
    ]
    return "\n".join(parts)


def _head(plan: Plan, model_name: str) -> str:
    kind = "sparse autoencoder" if plan.writes is None else "transcoder"
    place = f"the activations at `{plan.reads}`"
    if plan.writes is not None:
        place += f", of which it makes those at `{plan.writes}`"
    size = plan.size
    return f"""---
library_name: saelens
tags:
- sparse-autoencoder
- saeguard
---

# {plan.name}

A {kind} on {place} of {model_name}: {size.settings.architecture}, {size.settings.d_sae:,} features of
{size.d_in:,} dimensions. Trained by Saeguard {version("saeguard")}.
"""


def _use(plan: Plan, config: RunConfig) -> str:
    model = "MODEL" if config.model is None else config.model.path
    return f"""## Use

```
saeguard serve --model {model} --sae {plan.name}=THIS_FOLDER
```

SAELens loads the same folder with `SAE.load_from_disk`.
"""


def _data(config: RunConfig, epoch: int) -> str:
    tokens, stream = config.steps * config.stream.batch, config.stream
    again = f" The data was read {epoch + 1} times." if epoch else ""
    left_out = [name for name, holds in (("each row's first token", stream.mask_first),
                ("special tokens", stream.mask_special)) if holds]  # fmt: skip
    if stream.outlier_norm:
        left_out.append(f"tokens with a norm above {stream.outlier_norm:g} times the median")
    apart = (
        f" Its first {config.run.heldout:,} documents were held out, and evaluated on." if config.run.evaluate else ""
    )
    return f"""## Data

{tokens:,} tokens of `{config.data.path}`, in batches of {stream.batch:,} from a buffer of {stream.buffer:,}.{again}
Left out: {", ".join(left_out) or "nothing"}.{apart}
"""


def _figures(figures: Mapping[str, Any], config: RunConfig) -> str:
    more = "\n`evaluation/report.html` has what was measured on the held-out text.\n" if config.run.evaluate else ""
    return f"""## Figures

Means over the last steps of training, on the batches it was trained on.

| loss | L0 | FVU | dead features |
|---|---|---|---|
| {_shown(figures["loss"])} | {_shown(figures["l0"])} | {_shown(figures["fvu"])} | {_shown(figures["dead_share"])} |
{more}"""


def _settings(plan: Plan) -> str:
    return "\n".join(["## Settings", "", "| | |", "|---|---|", *_rows(plan), ""])


def _rows(plan: Plan) -> Iterator[str]:
    for one in fields(plan.settings):
        yield f"| {one.name} | {msgspec.to_builtins(getattr(plan.settings, one.name))} |"


def _shown(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"
