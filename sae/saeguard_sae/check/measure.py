"""How an SAE does on the model that it is served with: what fires, what it leaves unexplained, what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from saeguard_sae.coders import MatchingPursuit, SparseCoder, Temporal
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import ModelConfig, Site, hooked

# A dictionary read by other conventions than its own, without a copy of its weights.


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """``dictionary`` on scaled activations, with its features scaled before and after the activation function.

    What is folded into weights elsewhere is multiplied here: a published dictionary can take gigabytes, and many
    conventions are tried on one.
    """

    dictionary: Dictionary
    scale_in: float = 1.0
    """Multiplies what is encoded."""
    scale_out: float = 1.0
    """Divides what is decoded."""
    before: Tensor | None = None
    """[d_sae] multiplies pre-activations: what thresholds and rivals are compared with."""
    after: Tensor | None = None
    """[d_sae] multiplies features before they are decoded."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.dictionary.d_sae

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> features [..., d_sae]."""
        pre = self.dictionary.pre_activations(self._scaled(x))
        return self.dictionary.activation(pre if self.before is None else pre * self.before)

    def decode(self, features: Tensor, x: Tensor) -> Tensor:
        """features [..., d_sae] of x -> [..., d_out], with the skip connection of the raw x."""
        values = features if self.after is None else features * self.after
        out = self.dictionary.decode(values, self._scaled(x)) / self.scale_out
        skip = self.dictionary.W_skip
        return out if skip is None else out + x.to(out.dtype) @ skip.T

    def _scaled(self, x: Tensor) -> Tensor:
        return x.to(self.dictionary.W_enc.dtype) * self.scale_in


# Sums over tokens, chunk by chunk, so that the features of all tokens are never held at once.


Reader: TypeAlias = Variant | MatchingPursuit | Temporal
"""What is measured: ``encode(x)``, and ``decode(features, x)``, a skip connection included."""

VALUES = 2**24
"""Feature values held at once: 64 MiB in float32, of which an activation needs a few."""


class Tally:
    """What fired on ordinary tokens, and how far the reconstructions are off."""

    def __init__(self) -> None:
        self.tokens = 0
        self._active = 0
        self._fired: Tensor | None = None
        self._error = 0.0
        self._spread = _Spread()

    @property
    def l0(self) -> float:
        """Features that are not 0 on a token, mean."""
        return self._active / self.tokens

    @property
    def dead_share(self) -> float:
        """Share of features that were 0 on every token."""
        assert self._fired is not None, "something was counted"
        return float((~self._fired).float().mean())

    @property
    def fvu(self) -> float:
        """Squared errors by squared deviations from the mean: sums over all tokens, not a mean of ratios."""
        if self._spread.squares:
            return self._error / self._spread.squares
        return inf if self._error else 0.0

    def count(self, features: Tensor) -> None:
        """features [n, d_sae] of n more tokens."""
        is_on = features != 0
        self.tokens += len(features)
        self._active += int(is_on.sum())
        fired = is_on.any(dim=0)
        self._fired = fired if self._fired is None else self._fired | fired

    def compare(self, reconstruction: Tensor, target: Tensor) -> None:
        """Both [n, width] in float32."""
        self._error += float((reconstruction - target).square().sum())
        self._spread.add(target)


class _Spread:
    """Squared deviations from the mean of tokens that come in chunks (Chan, Golub and LeVeque 1979).

    The shorter way over the sum of squares cancels where the mean is long, as in a residual stream.
    """

    def __init__(self) -> None:
        self.squares = 0.0
        self._tokens = 0
        self._mean: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        mean = x.mean(dim=0)
        self.squares += float((x - mean).square().sum())
        ahead = mean.cpu().double() - self._mean
        total = self._tokens + len(x)
        self.squares += float(ahead.square().sum()) * self._tokens * len(x) / total
        self._mean = self._mean + ahead * (len(x) / total)
        self._tokens = total


def tally_metrics(reader: Reader, x: Tensor, ordinary: Tensor, tally: Tally, *, decodes: bool = True) -> Tensor | None:
    """x [T, d_in], one whole text -> the reconstruction of its ordinary tokens [n, d_out] in float32.

    Args:
        ordinary: bool [T].
        tally: counts the features of those tokens.
        decodes: False leaves the reconstruction out: None.
    """
    if isinstance(reader, Temporal):  # needs the tokens before each token, special ones too
        tally.count(reader.encode(x)[ordinary])
        return reader.reconstruct(x)[ordinary].float() if decodes else None
    parts = []
    for part in torch.split(x[ordinary], max(1, VALUES // reader.d_sae)):
        features = reader.encode(part)
        tally.count(features)
        if decodes:
            parts.append(reader.decode(features, part).float())
    return torch.cat(parts) if decodes else None


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [T] -> logits [T, vocabulary]."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids[None].to(device), use_cache=False).logits
    return logits[0]


def ordinary(ids: Tensor, special_ids: frozenset[int]) -> Tensor:
    """ids [T], a whole text -> bool [T], which of its tokens are counted and spliced.

    Not the first one, special or not: where no BOS takes that part, models make it an attention sink, whose activation
    is so long, and so unlike all others, that a few of them decide the sums.
    """
    is_special = torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype, device=ids.device))
    return ~is_special & (torch.arange(len(ids), device=ids.device) > 0)


_POSITIONS = 128
"""Whose log-probabilities are held at once: vocabularies go up to hundreds of thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeMeasurements:
    """Sums over ordinary tokens, which a text's first one is not.

    None stands for what an SAE that writes at several sites has no part in alone.
    """

    tokens: int
    l0: float
    """Features that are not 0 on a token, mean."""
    fvu: float | None
    """Share of the variance of what it must reproduce that it leaves unexplained."""
    ce_base: float | None
    """The model's cross-entropy, in nats per token."""
    ce_spliced: float | None
    """The same with reconstructions in place of the activations of ordinary tokens."""
    dead_share: float
    """Share of features that were 0 on every token."""

    @property
    def ce_increase(self) -> float | None:
        """By how much the model gets worse."""
        return None if self.ce_base is None or self.ce_spliced is None else self.ce_spliced - self.ce_base


def reader(coder: SparseCoder) -> Reader:
    """What is served, as it is measured."""
    return Variant(coder) if isinstance(coder, Dictionary) else coder


def is_transcoder(sae: LoadedSae) -> bool:
    """Whether it reproduces something else than what it reads."""
    return isinstance(sae.dictionary, Dictionary) and sae.dictionary.is_transcoder


def target(sae: LoadedSae) -> Site | None:
    """Whose activations it must reproduce; None for one that writes its part at several sites."""
    if len(sae.write_sites) > 1:
        return None
    if not is_transcoder(sae):
        return sae.site
    written = sae.write_sites[0]
    return written if sae.write_gain is None else Site(written.layer, "mlp_normalized")


@torch.inference_mode()
def measure_sae(
    model: nn.Module, config: ModelConfig, sae: LoadedSae, tokens: Sequence[Tensor], special_ids: frozenset[int]
) -> SaeMeasurements:
    """What the SAE does on these texts, each read on its own.

    Args:
        tokens: int64 ids [T] of each text.
        special_ids: tokens that SAEs do not read; they keep their activations and are not counted.

    Raises:
        ValueError: fewer than two ordinary tokens.
    """
    splice = _Splice(sae)
    base, spliced = _Loss(), _Loss()
    for ids in tokens if splice.target is not None else ():
        base.add(run(model, ids), ids)
    with hooked(model, config, splice.sites, splice.visit):
        for ids in tokens:
            splice.begin(ordinary(ids, special_ids))
            spliced.add(run(model, ids), ids)
    return splice.measured(base, spliced)


class _Splice:
    """Puts reconstructions in the place of activations, and measures both on the way."""

    def __init__(self, sae: LoadedSae) -> None:
        self.tally = Tally()
        self.target = target(sae)
        self._sae = sae
        self._reader = reader(sae.dictionary)
        self._writes = sae.write_sites[0] if self.target is not None else None
        self.sites = {site for site in (sae.site, self.target, self._writes) if site is not None}
        self._ordinary: Tensor | None = None
        self._reconstruction: Tensor | None = None
        self._wanted: Tensor | None = None

    def begin(self, ordinary: Tensor) -> None:
        """Before a text is read: which of its tokens are ordinary."""
        self._ordinary = ordinary
        self._reconstruction = self._wanted = None

    def measured(self, base: _Loss, spliced: _Loss) -> SaeMeasurements:
        """Of all the texts that were read."""
        tally, alone = self.tally, self.target is not None
        if tally.tokens < 2:
            raise ValueError(
                f"the text has {tally.tokens} tokens to measure on, the first and special ones aside; give more"
            )
        return SaeMeasurements(
            tokens=tally.tokens,
            l0=tally.l0,
            fvu=tally.fvu if alone else None,
            ce_base=base.mean if alone else None,
            ce_spliced=spliced.mean if alone else None,
            dead_share=tally.dead_share,
        )

    def visit(self, site: Site, x: Tensor, seen: Tensor) -> Tensor | None:
        """Reads where the SAE reads, compares with what it must reproduce, writes where it writes."""
        assert self._ordinary is not None, "begun"
        rows = self._ordinary.to(x.device)
        if site == self._sae.site:
            decodes = self.target is not None
            self._reconstruction = tally_metrics(self._reader, seen[0], rows, self.tally, decodes=decodes)
        if site == self.target:
            self._wanted = seen[0, rows].float()
        return self._written(x, rows) if site == self._writes else None

    def _written(self, x: Tensor, rows: Tensor) -> Tensor:
        assert self._reconstruction is not None, "what is written was read before"
        assert self._wanted is not None, "and what it must reproduce is at the same place or before"
        self.tally.compare(self._reconstruction, self._wanted)
        new = self._reconstruction
        if self._writes != self.target:
            error = new - self._wanted
            gain = self._sae.write_gain
            new = x[0, rows].float() + (error if gain is None else error * gain.to(error))
        out = x.clone()
        out[0, rows] = new.to(x.dtype)
        return out


class _Loss:
    """The mean cross-entropy of next tokens."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._predicted = 0

    @property
    def mean(self) -> float:
        return self._nats / self._predicted

    def add(self, logits: Tensor, ids: Tensor) -> None:
        """logits [T, vocabulary] and the ids [T] they were computed from."""
        following = ids[1:].to(logits.device)
        self._predicted += len(following)
        for part, wanted in zip(torch.split(logits[:-1], _POSITIONS), torch.split(following, _POSITIONS), strict=True):
            self._nats += float(functional.cross_entropy(part.float(), wanted, reduction="sum"))


# Activations of a sample of the text at every site that an SAE may belong to, from one pass over it.


SAMPLE = 256
"""Ordinary tokens on which alternatives are tried: enough to tell factors apart, few enough to hold at many sites."""


class Captured:
    """Activations of a few texts at many sites: those of these widths."""

    def __init__(self, widths: set[int]) -> None:
        self._widths = widths
        self.ordinary: list[Tensor] = []
        self.at: dict[Site, list[Tensor]] = {}

    def visit(self, site: Site, x: Tensor, seen: Tensor) -> None:
        """Keeps what an SAE reads at the site."""
        if seen.shape[-1] in self._widths:
            self.at.setdefault(site, []).append(seen[0].clone())

    def width(self, site: Site) -> int | None:
        """Of the activations there; None where they were not kept."""
        return self.at[site][0].shape[-1] if site in self.at else None

    def rows(self, site: Site) -> Tensor:
        """[n, width] of the ordinary tokens."""
        return torch.cat([x[rows.to(x.device)] for x, rows in zip(self.at[site], self.ordinary, strict=True)])


def capture(
    model: nn.Module,
    config: ModelConfig,
    sites: set[Site],
    widths: set[int],
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
) -> Captured:
    """What is at these sites, where it has one of these widths."""
    captured = Captured(widths)
    with hooked(model, config, sites, captured.visit):
        for ids in _sample(tokens, special_ids):
            captured.ordinary.append(ordinary(ids, special_ids))
            run(model, ids)
    return captured


def _sample(tokens: Iterable[Tensor], special_ids: frozenset[int]) -> Iterator[Tensor]:
    """The first texts, the last one cut, with SAMPLE ordinary tokens in all."""
    left = SAMPLE
    for ids in tokens:
        reached = ordinary(ids, special_ids).cumsum(0)
        part = ids[: int((reached <= left).sum())]
        left -= int(ordinary(part, special_ids).sum())
        if len(part):
            yield part
        if left <= 0:
            return
