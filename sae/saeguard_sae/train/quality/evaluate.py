"""Measures an SAE on a model: one pass over text, with the frozen baseline beside it in everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from saeguard_sae.catalogue import Quality
from saeguard_sae.check.measure import VALUES, is_transcoder, reader
from saeguard_sae.coders import SparseCoder
from saeguard_sae.dictionary import Dictionary, JumpReLU
from saeguard_sae.loading import LoadedSae
from saeguard_sae.train.data import contexts
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.quality.metrics import (
    Agreement,
    Decode,
    EvaluateSettings,
    EvaluationBatch,
    EvaluationRow,
    Examples,
    FeatureExamples,
    Histogram,
    Loss,
    Tally,
    Watch,
    agreement,
    evaluation_batches,
    max_cosines,
    of_values,
    of_whole_numbers,
    read_tally,
    spread,
)
from saeguard_sae.train.quality.probes import CapturedSite, LabelledTexts, Probes, Probing, Subject
from saeguard_sae.train.settings import DataSettings, StreamSettings, TrainError

# The frozen baseline: an SAE whose decoder was never trained, to be measured beside one that was.
#
# Figures that it reaches too say nothing about the features of the trained one: on several popular measures, SAEs
# with random decoders came close to trained ones. The baseline is fit in closed form, by least squares, not by
# gradient steps.


WHAT = (
    "A frozen random dictionary of the same width. Decoder directions: random, all of one length. Encoder: their "
    "transpose, on activations less their mean (a transcoder's baseline: on the best linear prediction of what must be "
    "reproduced). One threshold for all features, so that as many fire on a token as in the SAE. The length of the "
    "directions and the bias: by least squares. Nothing was trained by gradient."
)
_RIDGE = 1e-4
"""Of a transcoder's linear prediction, in shares of the mean variance of what it reads."""


def frozen_baseline(
    x: Tensor, wanted: Tensor, *, d_sae: int, l0: float, seed: int, is_transcoder: bool = False
) -> Dictionary:
    """x [n, d_in], wanted [n, d_out], float32 -> a dictionary with random decoder directions and this L0.

    Args:
        is_transcoder: whether ``wanted`` is something else than ``x`` itself.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, wanted.shape[1], generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(x.device)
    mean = x.mean(0)
    weight = _linear(x - mean, wanted - wanted.mean(0)) @ rows.T if is_transcoder else rows.T
    draft = Dictionary(
        W_enc=weight,
        b_enc=-mean @ weight,
        W_dec=rows,
        b_dec=torch.zeros_like(wanted[0]),
        activation=JumpReLU(torch.zeros(d_sae, device=x.device)),
        centre=False,
        is_transcoder=is_transcoder,
    )
    cut = _cut(draft, x, round(l0 * len(x)))
    return _scaled(draft, JumpReLU(torch.full((d_sae,), cut, device=x.device)), x, wanted)


def _linear(x: Tensor, y: Tensor) -> Tensor:
    """Both centred, [n, d_in] and [n, d_out] -> [d_in, d_out] by ridge regression."""
    x, y = x.double(), y.double()
    square = x.T @ x
    ridge = _RIDGE * square.diagonal().mean().clamp(min=1e-12)
    solved: Tensor = torch.linalg.solve(square + ridge * torch.eye(len(square)).to(square), x.T @ y)
    return solved.float()


def _cut(draft: Dictionary, x: Tensor, count: int) -> float:
    """Above which ``count`` of all pre-activations lie."""
    count = max(1, min(count, len(x) * draft.d_sae - 1)) + 1
    kept = torch.empty(0, device=x.device)
    for part in torch.split(x, max(1, VALUES // draft.d_sae)):
        pre = draft.pre_activations(part).flatten()
        kept = torch.cat([kept, pre.topk(min(count, len(pre)), sorted=False).values])
        kept = kept.topk(min(count, len(kept)), sorted=False).values
    return float(kept.min())


def _scaled(draft: Dictionary, activation: JumpReLU, x: Tensor, wanted: Tensor) -> Dictionary:
    """With the gain and the bias by which ``gain * f @ W_dec + b_dec`` comes nearest to ``wanted``."""
    parts = []
    for part in torch.split(x, max(1, VALUES // draft.d_sae)):
        parts.append(activation(draft.pre_activations(part)) @ draft.W_dec)
    made = torch.cat(parts)
    mean, centre = made.mean(0), wanted.mean(0)
    spread = (made - mean).square().sum(dtype=torch.float64)
    gain = float(((made - mean).double() * (wanted - centre)).sum() / spread.clamp(min=1e-30))
    return Dictionary(
        W_enc=draft.W_enc,
        b_enc=draft.b_enc,
        W_dec=gain * draft.W_dec,
        b_dec=centre - gain * mean,
        activation=activation,
        centre=False,
        is_transcoder=draft.is_transcoder,
    )


# What an evaluation found: ``evaluation.json``, complete, with its version, written whole or not at all.


VERSION = 1
FILE = "evaluation.json"


class Subjects(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was evaluated."""

    model: str
    sae: str
    digest: str
    """SHA-256 of the SAE's files, hex."""
    format: str
    architecture: str
    reads: str
    """The site where it reads."""
    writes: str
    """The site whose activations it replaces."""
    d_in: int
    d_out: int
    d_sae: int


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On what it was measured; tokens are ordinary ones."""

    source: str
    tokens: int
    loss_tokens: int
    loss_positions: int
    """Positions whose next token is text: the means of cross-entropy and KL are over them."""
    fit_tokens: int
    outliers: int
    """Tokens left out for their norms."""


class Losses(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the model, in nats per token: as it is, and with the site's tensor replaced by its mean and by zeros."""

    ce_base: float
    ce_mean_ablated: float
    ce_zero_ablated: float
    kl_mean_ablated: float
    kl_zero_ablated: float


class QualityMetrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one dictionary; cross-entropy and KL in nats per token, KL(spliced || base)."""

    l0: float
    fvu: float
    cosine: float
    norm_ratio: float
    ce_spliced: float
    ce_increase: float
    kl: float
    ce_recovered_mean: float | None
    """Share of what mean ablation costs that the reconstruction does not; None where it costs nothing."""
    ce_recovered_zero: float | None
    kl_recovered_mean: float | None
    kl_recovered_zero: float | None
    dead_share: float
    """Share of features that never fired; an upper bound on fewer than a million tokens."""
    dense_share: float
    """Share of features that fire on more than a tenth of the tokens."""
    max_cosine: float
    """Mean over features of the largest cosine with another feature's decoder row."""
    duplicate_share: float
    """Share of features with a largest cosine above 0.9."""
    cosine_features: int
    """Features that these two were taken over: all, or a random sample of a wide dictionary."""
    l0_histogram: Histogram
    """Tokens by the number of features that fire."""
    density_histogram: Histogram
    """Features that fired, by log10 of the share of tokens on which they do."""
    cosine_histogram: Histogram
    """Features by their largest cosine with another."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that was measured; ``frozen`` is the baseline, which ``frozen_what`` describes."""

    version: int = VERSION
    subjects: Subjects
    text: Text
    losses: Losses
    sae: QualityMetrics
    frozen: QualityMetrics
    frozen_what: str
    probes: Probes | None = None
    agreement: Agreement | None = None
    agreement_by_chance: Agreement | None = None
    """Of random directions, as many in the same widths."""
    agreement_with: str | None = None
    """The other SAE's path."""
    examples: tuple[FeatureExamples, ...] = ()

    def quality(self) -> Quality:
        """The part that an SAE's catalogue has a place for."""
        return Quality(
            l0=self.sae.l0,
            fvu=self.sae.fvu,
            ce_base=self.losses.ce_base,
            ce_spliced=self.sae.ce_spliced,
            ce_mean_ablated=self.losses.ce_mean_ablated,
            dead_share=self.sae.dead_share,
            tokens=self.text.tokens,
        )


def write_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """``evaluation.json`` in the folder."""
    return write_whole(folder / FILE, msgspec.json.format(msgspec.json.encode(evaluation), indent=2) + b"\n")


def read_evaluation(file: Path) -> Evaluation:
    """
    Raises:
        ValueError: not an evaluation of this version; the message names the file.
    """
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Evaluation)
    except (msgspec.DecodeError, msgspec.ValidationError) as err:
        raise ValueError(f"{file}: {err}") from err
    if found.version != VERSION:
        raise ValueError(f"{file}: version {found.version} is not supported; {VERSION} is")
    return found


def write_whole(file: Path, data: bytes) -> Path:
    """The file with this content, or as it was."""
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file


# From sums to the figures of one dictionary.


DENSE = 0.1
"""A feature that fires on a larger share of the tokens is dense."""
DUPLICATE = 0.9
"""Features with a larger cosine are near to the same."""
_COSINE_FEATURES = 16_384
"""Features whose largest cosine is looked for; of wider dictionaries a random sample."""
_DENSITIES = torch.linspace(-7, 0, 29, dtype=torch.float64)
_COSINES = torch.linspace(-0.2, 1, 49, dtype=torch.float64)
_NOTHING = 1e-9
"""Nats: an ablation that costs less says nothing about what is recovered of it."""


def quality_metrics(coder: SparseCoder, tally: Tally, loss: Loss, losses: Losses, seed: int) -> QualityMetrics:
    """Everything about one dictionary."""
    density = tally.density
    cosines = max_cosines(coder.W_dec, _sample(coder.d_sae, seed)).double().cpu()
    spliced, kl = loss.cross_entropy, loss.divergence
    return QualityMetrics(
        l0=tally.l0,
        fvu=tally.fvu,
        cosine=tally.cosine,
        norm_ratio=tally.norm_ratio,
        ce_spliced=spliced,
        ce_increase=spliced - losses.ce_base,
        kl=kl,
        ce_recovered_mean=_recovered(spliced, losses.ce_base, losses.ce_mean_ablated),
        ce_recovered_zero=_recovered(spliced, losses.ce_base, losses.ce_zero_ablated),
        kl_recovered_mean=_recovered(kl, 0.0, losses.kl_mean_ablated),
        kl_recovered_zero=_recovered(kl, 0.0, losses.kl_zero_ablated),
        dead_share=tally.dead_share,
        dense_share=float((density > DENSE).double().mean()),
        max_cosine=float(cosines.mean()),
        duplicate_share=float((cosines > DUPLICATE).double().mean()),
        cosine_features=len(cosines),
        l0_histogram=of_whole_numbers(tally.by_l0.cpu()),
        density_histogram=of_values(density[density > 0].log10(), _DENSITIES),
        cosine_histogram=of_values(cosines, _COSINES),
    )


def check_width(sae: LoadedSae, other: LoadedSae) -> None:
    """Refuses an SAE whose directions lie in another space.

    Raises:
        TrainError: names both widths.
    """
    if other.dictionary.d_out != sae.dictionary.d_out:
        raise TrainError(
            f"other: SAE {other.name!r} writes {other.dictionary.d_out} wide, the first one {sae.dictionary.d_out}"
        )


def by_chance(width: int, first: int, second: int, seed: int) -> Agreement:
    """Of two dictionaries of random directions, with so many features of this width: what agreement starts from."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(n, width, generator=generator) for n in (first, second))
    return agreement(one, two, seed)


def _recovered(changed: float, base: float, ablated: float) -> float | None:
    """The share of what ablation costs that does not come back as the cost of the change."""
    return None if ablated - base < _NOTHING else (ablated - changed) / (ablated - base)


def _sample(d_sae: int, seed: int) -> Tensor | None:
    if d_sae <= _COSINE_FEATURES:
        return None
    return torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:_COSINE_FEATURES]


_LOGITS = 2**27
"""Held at once of one pass: 512 MiB in float32."""
_TOKENS = 4096
"""Of one forward pass at most."""
_FIT_SHARE = 5
"""Of the first rows one in so many is for the fit."""

Progress = Callable[[int], None]
"""Told the number of tokens measured so far, after each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What an SAE is measured on.

    ``model`` is a Hugging Face causal language model in evaluation mode, ``decode`` its tokenizer's.
    """

    model: Any
    name: str
    """The model's."""
    rows: Iterable[EvaluationRow]
    """Of the text; each token once."""
    source: str
    """Where the text is from, for the report."""
    decode: Decode
    labelled: Sequence[tuple[EvaluationRow, str]] = ()
    """Texts with their labels, for probes."""


class _Side:
    """One of the two dictionaries with its sums."""

    def __init__(self, coder: SparseCoder, device: torch.device) -> None:
        self.coder = coder
        self.reader = reader(coder)
        self.tally = Tally(coder.d_sae, device)
        self.loss = Loss()


@torch.inference_mode()
def evaluate_saes(
    sae: LoadedSae,
    material: Material,
    settings: EvaluateSettings | None = None,
    *,
    other: LoadedSae | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Everything that is asked for, on text that should not have trained the SAE.

    Args:
        other: another seed of the same SAE, or another SAE at the same place: agreement is measured.

    Raises:
        TrainError: too little text, activations that are not finite, an SAE of another kind or width.
    """
    settings = settings or EvaluateSettings()
    if other is not None:
        check_width(sae, other)
    run = _Run(sae, material, settings)
    run.measure(progress)
    return run.found(other)


class _Run:
    """One evaluation: what was read first to fit the baseline, then the sums over the text."""

    def __init__(self, sae: LoadedSae, material: Material, settings: EvaluateSettings) -> None:
        self._sae, self._material, self._settings = sae, material, settings
        self._subject = Subject(material.model, material.model.config, sae)
        vocabulary = int(material.model.config.vocab_size)
        self._size = min(_TOKENS, max(1, _LOGITS // vocabulary))
        first, self._rest = _parted(material.rows, settings.fit_tokens)
        fit, self._limits = self._fit_sample(first)
        self.fit_tokens = len(fit.read)
        self._mean = fit.wanted.mean(0)
        device = self._subject.device
        own = _Side(sae.dictionary.to(device), device)
        read_tally(own.reader, fit.read, fit.wanted, own.tally)
        self._examples = Examples(spread(own.tally.density, settings.examples), settings.contexts)
        self.frozen = _Side(self._baseline(fit, own.tally.l0, settings.seed), device)
        self.own = _Side(own.coder, device)
        self._base, self._by_mean, self._by_zero = Loss(), Loss(), Loss()
        self._loss_tokens = self._left_out = 0

    def measure(self, progress: Progress | None) -> None:
        """Reads the text."""
        for batch in evaluation_batches(self._rest, self._size):
            self._add(batch.to(self._subject.device))
            if progress is not None:
                progress(self.own.tally.tokens)
            if self.own.tally.tokens >= self._settings.tokens:
                return
        if self.own.tally.tokens < 2:
            raise TrainError("data: too little text: no two tokens are left to measure on")

    def found(self, other: LoadedSae | None) -> Evaluation:
        """All of it."""
        subject, settings = self._subject, self._settings
        labelled = self._material.labelled
        probes = Probing(subject, labelled).run(self.own.reader, self.frozen.reader, settings) if labelled else None
        losses = self._losses()
        own, far = self.own.coder, None if other is None else other.dictionary
        return Evaluation(
            subjects=self._subjects(),
            text=self._text(),
            losses=losses,
            sae=quality_metrics(own, self.own.tally, self.own.loss, losses, settings.seed),
            frozen=quality_metrics(self.frozen.coder, self.frozen.tally, self.frozen.loss, losses, settings.seed),
            frozen_what=WHAT,
            probes=probes,
            agreement=None if far is None else agreement(own.W_dec, far.W_dec.to(own.W_dec.device), settings.seed),
            agreement_by_chance=None if far is None else by_chance(own.d_out, own.d_sae, far.d_sae, settings.seed),
            agreement_with=None if other is None else other.name,
            examples=self._examples.shown(self.own.tally.density, self._material.decode),
        )

    def _fit_sample(self, rows: list[EvaluationRow]) -> tuple[CapturedSite, tuple[float, float]]:
        """What is at the sites for the first rows, and the norms above which a token is an outlier."""
        parts = [
            self._subject.capture(one.to(self._subject.device), logits=False)
            for one in evaluation_batches(rows, self._size)
        ]
        read, wanted = torch.cat([one.read for one in parts]), torch.cat([one.wanted for one in parts])
        factor = self._settings.outlier_norm or float("inf")
        norms = read.norm(dim=1), wanted.norm(dim=1)
        limits = tuple(factor * float(one.median()) for one in norms)
        keep = (norms[0] <= limits[0]) & (norms[1] <= limits[1])
        return CapturedSite(read[keep], wanted[keep], None), (limits[0], limits[1])

    def _baseline(self, fit: CapturedSite, l0: float, seed: int) -> SparseCoder:
        return frozen_baseline(
            fit.read,
            fit.wanted,
            d_sae=self._sae.dictionary.d_sae,
            l0=l0,
            seed=seed,
            is_transcoder=is_transcoder(self._sae),
        )

    def _add(self, batch: EvaluationBatch) -> None:
        asks_loss = self._loss_tokens < self._settings.loss_tokens
        whole = self._subject.capture(batch, logits=asks_loss)
        batch, captured = self._without_outliers(batch, whole)
        self._examples.begin(batch)
        new = [
            self._read(self.own, captured, self._examples.watch),
            self._read(self.frozen, captured, None),
            self._mean.expand_as(captured.wanted),
            torch.zeros_like(captured.wanted),
        ]
        if captured.logits is None:
            return
        self._loss_tokens += len(captured.read)
        self._base.add(captured.logits, batch)
        for values, loss in zip(new, (self.own.loss, self.frozen.loss, self._by_mean, self._by_zero), strict=True):
            loss.add(self._subject.spliced(batch, captured, values), batch, captured.logits)

    @staticmethod
    def _read(side: _Side, captured: CapturedSite, watch: Watch | None) -> Tensor:
        return read_tally(side.reader, captured.read, captured.wanted, side.tally, watch)

    def _without_outliers(self, batch: EvaluationBatch, whole: CapturedSite) -> tuple[EvaluationBatch, CapturedSite]:
        keep = (whole.read.norm(dim=1) <= self._limits[0]) & (whole.wanted.norm(dim=1) <= self._limits[1])
        self._left_out += int((~keep).sum())
        ordinary = batch.ordinary.clone()
        ordinary[batch.ordinary] = keep
        return replace(batch, ordinary=ordinary), CapturedSite(whole.read[keep], whole.wanted[keep], whole.logits)

    def _losses(self) -> Losses:
        if not self._base.positions:
            raise TrainError("data: too little text: no token follows another")
        return Losses(
            ce_base=self._base.cross_entropy,
            ce_mean_ablated=self._by_mean.cross_entropy,
            ce_zero_ablated=self._by_zero.cross_entropy,
            kl_mean_ablated=self._by_mean.divergence,
            kl_zero_ablated=self._by_zero.divergence,
        )

    def _text(self) -> Text:
        return Text(
            source=self._material.source,
            tokens=self.own.tally.tokens,
            loss_tokens=self._loss_tokens,
            loss_positions=self._base.positions,
            fit_tokens=self.fit_tokens,
            outliers=self._left_out,
        )

    def _subjects(self) -> Subjects:
        coder = self._sae.dictionary
        return Subjects(
            model=self._material.name,
            sae=self._sae.name,
            digest=self._sae.digest,
            format=self._sae.format,
            architecture=coder.architecture,
            reads=str(self._subject.reads),
            writes=str(self._subject.target),
            d_in=coder.d_in,
            d_out=coder.d_out,
            d_sae=coder.d_sae,
        )


def _parted(rows: Iterable[EvaluationRow], fit_tokens: int) -> tuple[list[EvaluationRow], Iterator[EvaluationRow]]:
    """The rows to fit on, and the rest: every fifth of the first rows, so that they are like what is measured on."""
    source = iter(rows)
    held: list[EvaluationRow] = []
    tokens = 0
    for row in source:
        held.append(row)
        tokens += int(row.ordinary.sum())
        if tokens >= _FIT_SHARE * fit_tokens:
            break
    fit = held[::_FIT_SHARE]
    if len(held) < 2 or sum(int(row.ordinary.sum()) for row in fit) < 2:
        raise TrainError(
            f"data: too little text: {tokens} tokens, special ones aside, in {len(held)} rows; at least two rows with "
            "two tokens each are needed"
        )
    return fit, chain((row for at, row in enumerate(held) if at % _FIT_SHARE), source)


# From a data set to rows that are measured on: each document once, none again when the data set ends.


def text_rows(model: LanguageModel, data: DataSettings, stream: StreamSettings) -> Iterator[EvaluationRow]:
    """The rows that training with these settings would read, up to the end of the data set.

    A packed row that would go on with the data set's start is left out.

    Raises:
        TrainError: see ``contexts``; text that is too short for a row.
    """
    source = contexts(model, data, stream)
    found = 0
    for row in source:
        if source.epoch > 0:
            break
        length = len(row.ids)
        if stream.packing == "documents":  # the rest is padding, which the loss must not count
            length = int(row.kept.nonzero().max()) + 1 if row.kept.any() else 1
        found += 1
        yield EvaluationRow(row.ids[:length], row.kept[:length])
    if not found:
        raise TrainError(
            f"data.path: {data.path!r} is shorter than a row of {source.context} tokens; give more text, or a smaller "
            "context"
        )


def labelled_rows(
    model: LanguageModel, labelled: Sequence[LabelledTexts], context: int
) -> list[tuple[EvaluationRow, str]]:
    """Each text as a row of its own, cut at ``context`` tokens; its first token is never ordinary.

    Raises:
        TrainError: a text without two tokens.
    """
    backend = model.tokenizer.backend_tokenizer
    bos = model.tokenizer.bos_token_id
    special = torch.tensor(sorted(model.special_ids), dtype=torch.long)
    found = []
    for number, one in enumerate(labelled, start=1):
        own = backend.encode(one.text, add_special_tokens=False).ids
        ids = torch.tensor(([] if bos is None else [int(bos)]) + own, dtype=torch.long)[:context]
        ordinary = ~torch.isin(ids, special) & (torch.arange(len(ids)) > 0)
        if not ordinary.any():
            raise TrainError(f"probe: text {number} has no token to read: {one.text[:40]!r}")
        found.append((EvaluationRow(ids, ordinary), str(one.label)))
    return found
