"""The check as a whole, and the text that a person reads when an SAE does not hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig
from saeguard_sae.check.bounds import Bounds, violations
from saeguard_sae.check.measure import Measured, measure
from saeguard_sae.check.suspects import Suspect, doubts, suspects
from saeguard_sae.loading import LoadedSae

_NONE_FITS = (
    "No other site of its width, bias convention, normalisation, scale or use of the decoder norms that was tried, "
    "alone or in pairs, fits. The SAE may belong to another model or revision of it, be damaged, or have been trained "
    "on other text; bounds in its settings or check.text then say what to expect."
)
_ONLY_LOSS = (
    "What it reads is as expected, so that its conventions are likely right. The model depends more on what it leaves "
    "out than the bound allows."
)


@dataclass(frozen=True, slots=True)
class Report:
    """What the check found; it is passed when there are no violations."""

    measured: Measured
    bounds: Bounds
    violations: tuple[str, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    doubts: tuple[Suspect, ...] = ()
    """Of one that passed: what would fit it clearly better."""

    def explain(self) -> str:
        """What was found, what was expected, and the convention that is most likely wrong, with its setting."""
        if not self.violations:
            return "\n".join([self._found(), *map(_doubt, self.doubts)])
        return "\n".join([f"{'; '.join(self.violations)}.", self._found(), *self._diagnosis()])

    def _found(self) -> str:
        found = self.measured
        parts = [f"L0 {found.l0:.4g}"]
        if found.fvu is not None:
            parts.append(f"FVU {found.fvu:.4g}")
        if found.ce_base is not None and found.ce_spliced is not None:
            parts.append(f"cross-entropy {found.ce_base:.4g}, with its reconstructions in place {found.ce_spliced:.4g}")
        parts.append(f"{found.dead_share:.1%} of its features fired on no token")
        return f"Measured on {found.tokens} tokens: {', '.join(parts)}."

    def _diagnosis(self) -> Iterator[str]:
        inside = [one for one in self.suspects if self.bounds.admits(one.l0, one.fvu)]
        if not self.suspects:
            yield _ONLY_LOSS if self.bounds.admits(self.measured.l0, self.measured.fvu) else _NONE_FITS
        for at, one in enumerate(self.suspects):
            if inside:
                lead = "Most likely" if at == 0 else "Also possible"
            else:
                lead = "Nothing that was tried fits its bounds; closest" if at == 0 else "Then"
            yield f"{lead}: {one.what}. {_numbers(one)} {_remedy(one)}"


def _doubt(one: Suspect) -> str:
    return f"Another reading fits it better: {one.what}. {_numbers(one)} {_remedy(one)}"


def _numbers(one: Suspect) -> str:
    fvu = "" if one.fvu is None else f" and FVU {one.fvu:.4g}"
    return f"So it has L0 {one.l0:.4g}{fvu} on a sample of the text."


def _remedy(one: Suspect) -> str:
    if one.setting is None:
        return "No setting makes it so: its files must be converted."
    return "In its settings: " + one.setting.replace("\n", "; ")


def check(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: Bounds,
) -> Report:
    """Measures an SAE on the model it is served with; where it lies outside the bounds, looks for the reason.

    One that passes is compared with its nearest alternatives: a layer off by one can lie within any bounds.

    Args:
        tokens: int64 ids [T] of each text.
        special_ids: tokens that SAEs do not read.

    Raises:
        ValueError: fewer than two ordinary tokens.
    """
    measured = measure(model, config, sae, tokens, special_ids)
    broken = violations(measured, bounds)
    look = suspects if broken else doubts
    found = tuple(look(model, config, sae, tokens, special_ids, bounds))
    return Report(measured, bounds, tuple(broken), *((found, ()) if broken else ((), found)))
