"""What an evaluation found: ``evaluation.json``, complete, with its version, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from saeguard_sae.catalogue import Quality
from saeguard_sae.train.quality.decoder import Agreement
from saeguard_sae.train.quality.examples import FeatureExamples
from saeguard_sae.train.quality.histogram import Histogram
from saeguard_sae.train.quality.probes import Probes

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


class Figures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    sae: Figures
    frozen: Figures
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


def write(evaluation: Evaluation, folder: Path) -> Path:
    """``evaluation.json`` in the folder."""
    return write_whole(folder / FILE, msgspec.json.format(msgspec.json.encode(evaluation), indent=2) + b"\n")


def read(file: Path) -> Evaluation:
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
