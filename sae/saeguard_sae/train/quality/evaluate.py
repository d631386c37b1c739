"""Measures an SAE on a model: one pass over text, with the frozen baseline beside it in everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.check.measure import is_transcoder, reader
from saeguard_sae.coder import SparseCoder
from saeguard_sae.loading import LoadedSae
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.quality.batch import Batch, Row, batches
from saeguard_sae.train.quality.decoder import agreement
from saeguard_sae.train.quality.evaluation import Evaluation, Losses, Subjects, Text
from saeguard_sae.train.quality.examples import Decode, Examples, spread
from saeguard_sae.train.quality.figures import by_chance, check_width, figures
from saeguard_sae.train.quality.frozen import WHAT, frozen_baseline
from saeguard_sae.train.quality.loss import Loss
from saeguard_sae.train.quality.probing import Probing
from saeguard_sae.train.quality.settings import EvaluateSettings
from saeguard_sae.train.quality.subject import Captured, Subject
from saeguard_sae.train.quality.tally import Tally, Watch, read

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
    rows: Iterable[Row]
    """Of the text; each token once."""
    source: str
    """Where the text is from, for the report."""
    decode: Decode
    labelled: Sequence[tuple[Row, str]] = ()
    """Texts with their labels, for probes."""


class _Side:
    """One of the two dictionaries with its sums."""

    def __init__(self, coder: SparseCoder, device: torch.device) -> None:
        self.coder = coder
        self.reader = reader(coder)
        self.tally = Tally(coder.d_sae, device)
        self.loss = Loss()


@torch.inference_mode()
def evaluate(
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
        read(own.reader, fit.read, fit.wanted, own.tally)
        self._examples = Examples(spread(own.tally.density, settings.examples), settings.contexts)
        self.frozen = _Side(self._baseline(fit, own.tally.l0, settings.seed), device)
        self.own = _Side(own.coder, device)
        self._base, self._by_mean, self._by_zero = Loss(), Loss(), Loss()
        self._loss_tokens = self._left_out = 0

    def measure(self, progress: Progress | None) -> None:
        """Reads the text."""
        for batch in batches(self._rest, self._size):
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
            sae=figures(own, self.own.tally, self.own.loss, losses, settings.seed),
            frozen=figures(self.frozen.coder, self.frozen.tally, self.frozen.loss, losses, settings.seed),
            frozen_what=WHAT,
            probes=probes,
            agreement=None if far is None else agreement(own.W_dec, far.W_dec.to(own.W_dec.device), settings.seed),
            agreement_by_chance=None if far is None else by_chance(own.d_out, own.d_sae, far.d_sae, settings.seed),
            agreement_with=None if other is None else other.name,
            examples=self._examples.shown(self.own.tally.density, self._material.decode),
        )

    def _fit_sample(self, rows: list[Row]) -> tuple[Captured, tuple[float, float]]:
        """What is at the sites for the first rows, and the norms above which a token is an outlier."""
        parts = [self._subject.capture(one.to(self._subject.device), logits=False) for one in batches(rows, self._size)]
        read, wanted = torch.cat([one.read for one in parts]), torch.cat([one.wanted for one in parts])
        factor = self._settings.outlier_norm or float("inf")
        norms = read.norm(dim=1), wanted.norm(dim=1)
        limits = tuple(factor * float(one.median()) for one in norms)
        keep = (norms[0] <= limits[0]) & (norms[1] <= limits[1])
        return Captured(read[keep], wanted[keep], None), (limits[0], limits[1])

    def _baseline(self, fit: Captured, l0: float, seed: int) -> SparseCoder:
        return frozen_baseline(
            fit.read,
            fit.wanted,
            d_sae=self._sae.dictionary.d_sae,
            l0=l0,
            seed=seed,
            is_transcoder=is_transcoder(self._sae),
        )

    def _add(self, batch: Batch) -> None:
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
    def _read(side: _Side, captured: Captured, watch: Watch | None) -> Tensor:
        return read(side.reader, captured.read, captured.wanted, side.tally, watch)

    def _without_outliers(self, batch: Batch, whole: Captured) -> tuple[Batch, Captured]:
        keep = (whole.read.norm(dim=1) <= self._limits[0]) & (whole.wanted.norm(dim=1) <= self._limits[1])
        self._left_out += int((~keep).sum())
        ordinary = batch.ordinary.clone()
        ordinary[batch.ordinary] = keep
        return replace(batch, ordinary=ordinary), Captured(whole.read[keep], whole.wanted[keep], whole.logits)

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


def _parted(rows: Iterable[Row], fit_tokens: int) -> tuple[list[Row], Iterator[Row]]:
    """The rows to fit on, and the rest: every fifth of the first rows, so that they are like what is measured on."""
    source = iter(rows)
    held: list[Row] = []
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
