"""What is known of a model from its files alone, without its weights: the same for every engine."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from saeguard.catalog import Model
from saeguard_sae.catalogue import Quality
from saeguard_sae.check import CheckBounds, CheckReport, bounds_from, calibration_text, check_sae
from saeguard_sae.loading import LoadedSae, LoadError, bind, weights_digest, with_settings
from saeguard_sae.models import ModelConfig, Site, layout, locate
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.observe import Metrics
from saeguard_server.settings import CheckSettings, ModelSettings, ServedSaeSettings
from saeguard_server.sources import open_sae_source

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


class ModelLoadError(ValueError):
    """A model that cannot be served; the message says what would help."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelFiles:
    """A Hugging Face model in the folder ``path``: its configuration, its tokenizer, and what callers see of it."""

    path: Path
    config: Any
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    info: Model


def open_files(settings: ModelSettings, max_context: int) -> ModelFiles:
    """The files of the model that the settings name, fetched from the hub where it is no local folder.

    Args:
        max_context: of the engine; the model's own limit holds where it is smaller.

    Raises:
        ModelLoadError: no such model, another digest than the settings ask for, an unknown architecture, no fast
            tokenizer.
    """
    try:
        path = _resolve(settings)
        found = weights_digest(tuple(sorted(file for pattern in _PATTERNS for file in path.glob(pattern))))
        if settings.digest is not None and settings.digest != found:
            raise ValueError(f"model.digest: its files have {found}, the settings ask for {settings.digest}")
        config: Any = AutoConfig.from_pretrained(path)
        layout(config.model_type)
        tokenizer = _tokenizer(path, config)
        eos_ids = _eos_ids(path, config)
    except (ValueError, OSError) as err:
        raise ModelLoadError(f"model {settings.path!r}: {err}") from err
    info = Model(
        name=settings.name or Path(settings.path).name,
        architecture=config.model_type,
        digest=found,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=min(max_context, config.max_position_embeddings),
        dtype=settings.dtype,
        has_chat_template=tokenizer.has_chat_template,
    )
    return ModelFiles(path, config, tokenizer, eos_ids, info)


def _resolve(settings: ModelSettings) -> Path:
    local = Path(settings.path)
    if local.is_dir():
        return local
    return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=list(_PATTERNS)))


def _tokenizer(path: Path, config: Any) -> Tokenizer:
    fast = AutoTokenizer.from_pretrained(path)
    if not isinstance(fast, PreTrainedTokenizerFast):
        raise ValueError("its tokenizer has no fast version (tokenizer.json); convert it with transformers")
    return Tokenizer(fast, config.vocab_size)


def _eos_ids(path: Path, config: Any) -> frozenset[int]:
    has_own = (path / "generation_config.json").is_file()
    found = GenerationConfig.from_pretrained(path).eos_token_id if has_own else None
    if found is None:
        found = config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])


# From a path to a model that can be served: weights in safetensors, a fast tokenizer, a known architecture.


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# SDPA leaves out the soft-capping of attention scores.
_EAGER = ("gemma2",)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A Hugging Face causal language model with its tokenizer."""

    network: Any
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    info: Model
    device: torch.device


def load_model(settings: ModelSettings, max_context: int) -> LoadedModel:
    """Loads the model that the settings name.

    Args:
        max_context: of the engine; the model's own limit holds where it is smaller.

    Raises:
        ModelLoadError: no such model, an unknown architecture, no fast tokenizer, weights not in safetensors.
    """
    files = open_files(settings, max_context)
    try:
        network = _network(files.path, files.config, settings)
    except (ValueError, OSError, RuntimeError, SafetensorError) as err:
        raise ModelLoadError(f"model {settings.path!r}: {err}") from err
    return LoadedModel(network, files.tokenizer, files.eos_ids, files.info, torch.device(settings.device))


def _network(path: Path, config: Any, settings: ModelSettings) -> nn.Module:
    if settings.dtype not in _DTYPES:
        raise ValueError(f"model.dtype: must be one of {', '.join(_DTYPES)}, got {settings.dtype!r}")
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]  # it would break up the log
    attention = "eager" if config.model_type in _EAGER else "sdpa"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=_DTYPES[settings.dtype],
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, by name
    )
    network: nn.Module = loaded[0]
    _check_complete(loaded[1])
    return network.to(settings.device).eval().requires_grad_(False)


def _check_complete(report: Mapping[str, Any]) -> None:
    """transformers fills in what the files lack with random numbers, and says so in the log only."""
    for name, what in (
        ("missing_keys", "its files lack weights that the architecture has"),
        ("mismatched_keys", "weights in its files have another shape than its config.json says"),
        ("error_msgs", "its files cannot be read whole"),
    ):
        if found := sorted(map(str, report.get(name) or ())):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(f"{what}: {', '.join(found[:3])}{more}")


# SAEs tied to the sites of a loaded model: where they read and write there, and whether they fit.


_SAE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_saes(settings: tuple[ServedSaeSettings, ...], model: LoadedModel) -> dict[str, LoadedSae]:
    """The SAEs by name, on the model's device.

    Raises:
        LoadError: one cannot be loaded, names a site that the model lacks, or has another width.
    """
    saes = {one.name: load_served_sae(one, model) for one in settings}
    _check_widths(model, saes)
    return saes


def load_served_sae(settings: ServedSaeSettings, model: LoadedModel) -> LoadedSae:
    """One SAE as the settings ask for it, at its sites in this model; its width is not yet compared.

    Raises:
        LoadError: it cannot be loaded, or names a site that the model lacks.
    """
    source = open_sae_source(settings)
    sae = bind(source.sae, model.network, model.network.config, source.overrides)
    own = {} if settings.dtype == "float32" else {"dtype": settings.dtype}
    moved = sae.dictionary.to(model.device, _SAE_DTYPES[settings.dtype])
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


# The check of every SAE on the model, before anybody is served: does it fit as its files or the settings say?


_log = logging.getLogger(__name__)

PASSAGE_TOKENS = 256
"""Longer passages are read in pieces of this: SAEs are trained on contexts of hundreds of tokens."""


def check_saes(
    saes: dict[str, LoadedSae], given: tuple[ServedSaeSettings, ...], model: LoadedModel, settings: CheckSettings
) -> dict[str, LoadedSae]:
    """The SAEs with what was measured of each.

    Raises:
        LoadError: one does not hold; names the convention that is most likely wrong.
    """
    if not settings.enabled or not saes:
        return saes
    tokens = calibration_tokens(settings, model)
    return {one.name: _checked(saes[one.name], one, model, tokens) for one in given}


def calibration_tokens(settings: CheckSettings, model: LoadedModel) -> list[Tensor]:
    """Token ids [T] of the passages of the calibration text, each read on its own as a prompt would be.

    Raises:
        LoadError: the text cannot be read or holds nothing.
    """
    try:
        text = Path(settings.text).read_text(encoding="utf-8") if settings.text else calibration_text()
    except (OSError, UnicodeDecodeError) as err:
        raise LoadError(f"check.text: {err}") from err
    passages = list(_passages(text, model, settings.max_tokens))
    if not passages:
        raise LoadError(f"check.text: {settings.text} holds no text")
    largest = max(int(one.max()) for one in passages)
    if largest >= model.info.vocab_size:
        raise LoadError(f"check.text: the tokenizer gives id {largest}, the model knows {model.info.vocab_size} ids")
    return passages


def measure_served_sae(sae: LoadedSae, bounds: CheckBounds, model: LoadedModel, tokens: list[Tensor]) -> CheckReport:
    """What the check finds of one SAE."""
    network = model.network
    return check_sae(network, network.config, sae, tokens, model.tokenizer.special_ids, bounds)


def bounds_of(sae: LoadedSae, given: ServedSaeSettings) -> CheckBounds:
    """What the check must find: what the settings say, else what the SAE's files state."""
    said = CheckBounds(**{name: getattr(given.bounds, name) for name in given.bounds.__struct_fields__})
    return bounds_from(sae.catalogue.quality, sae.stated_l0, said)


def record_checks(saes: dict[str, LoadedSae], metrics: Metrics) -> None:
    """What was measured, as metrics."""
    for name, sae in saes.items():
        found = sae.measured
        if found is None:
            continue
        for gauge, value in ((metrics.sae_l0, found.l0), (metrics.sae_fvu, found.fvu)):
            if value is not None:
                gauge.labels(name).set(value)
        if found.ce_spliced is not None and found.ce_base is not None:
            metrics.sae_ce_increase.labels(name).set(found.ce_spliced - found.ce_base)


def _checked(sae: LoadedSae, given: ServedSaeSettings, model: LoadedModel, tokens: list[Tensor]) -> LoadedSae:
    started = time.monotonic()
    try:
        report = measure_served_sae(sae, bounds_of(sae, given), model, tokens)
    except ValueError as err:
        raise LoadError(f"SAE {sae.name!r}: the check cannot be made: {err}") from err
    if report.violations:
        raise LoadError(f"SAE {sae.name!r} does not fit this model: {report.explain()}")
    found = report.measured
    facts = {"sae": sae.name, "l0": found.l0, "fvu": found.fvu, "seconds": round(time.monotonic() - started, 2)}
    _log.info("checked", extra={"fields": facts})
    for doubt in report.doubts:
        fields = {"sae": sae.name, "reading": doubt.what, "fvu": doubt.fvu, "setting": doubt.setting}
        _log.warning("an SAE is within its bounds, but another reading fits it better", extra={"fields": fields})
    return replace(sae, measured=quality_of(report))


def quality_of(report: CheckReport) -> Quality:
    """What was measured, as the catalogue holds it."""
    found = report.measured
    return Quality(
        l0=found.l0,
        fvu=found.fvu,
        ce_base=found.ce_base,
        ce_spliced=found.ce_spliced,
        dead_share=found.dead_share,
        tokens=found.tokens,
    )


def _passages(text: str, model: LoadedModel, budget: int) -> Iterator[Tensor]:
    size = min(PASSAGE_TOKENS, model.info.max_context)
    for passage in text.split("\n\n"):
        ids = model.tokenizer.encode(passage).ids if passage.strip() else ()
        for start in range(0, len(ids), size):
            part = ids[start : start + min(size, budget)]
            budget -= len(part)
            if len(part) > 1:
                yield torch.tensor(part, device=model.device)


# When an engine that failed may start again.


FIRST_S, LONGEST_S = 0.5, 30.0
GOOD_SERVICE_S = 60.0
"""An engine that ran this long has recovered."""


class Backoff:
    """Waits before each start: none before the first, then half a second, doubled each time, up to half a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._started: float | None = None

    def started(self) -> None:
        """Notes that it serves again."""
        self._started = self._clock()

    def failed(self) -> float:
        """Notes a failure, of a running engine or of a start -> seconds to wait before the next start."""
        if self._started is not None and self._clock() - self._started >= GOOD_SERVICE_S:
            self._failures = 0
        self._failures, self._started = self._failures + 1, None
        doublings = min(self._failures - 2, 10)  # 2 ** n overflows a float at last
        return 0.0 if self._failures == 1 else min(FIRST_S * 2.0**doublings, LONGEST_S)
