"""The check as a whole, and the text that a person reads when an SAE does not hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

from torch import Tensor, nn

from saeguard_sae.check.check import CheckBounds, Hypothesis, hypotheses, unstated_warnings, violations
from saeguard_sae.check.measure import SaeMeasurements, measure_sae
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import ModelConfig

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
class CheckReport:
    """What the check found; it is passed when there are no violations."""

    measured: SaeMeasurements
    bounds: CheckBounds
    violations: tuple[str, ...] = ()
    suspects: tuple[Hypothesis, ...] = ()
    doubts: tuple[Hypothesis, ...] = ()
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


def _doubt(one: Hypothesis) -> str:
    return f"Another reading fits it better: {one.what}. {_numbers(one)} {_remedy(one)}"


def _numbers(one: Hypothesis) -> str:
    fvu = "" if one.fvu is None else f" and FVU {one.fvu:.4g}"
    return f"So it has L0 {one.l0:.4g}{fvu} on a sample of the text."


def _remedy(one: Hypothesis) -> str:
    if one.setting is None:
        return "No setting makes it so: its files must be converted."
    return "In its settings: " + one.setting.replace("\n", "; ")


def check_sae(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: CheckBounds,
) -> CheckReport:
    """Measures an SAE on the model it is served with; where it lies outside the bounds, looks for the reason.

    One that passes is compared with its nearest alternatives: a layer off by one can lie within any bounds.

    Args:
        tokens: int64 ids [T] of each text.
        special_ids: tokens that SAEs do not read.

    Raises:
        ValueError: fewer than two ordinary tokens.
    """
    measured = measure_sae(model, config, sae, tokens, special_ids)
    broken = violations(measured, bounds)
    look = hypotheses if broken else unstated_warnings
    found = tuple(look(model, config, sae, tokens, special_ids, bounds))
    return CheckReport(measured, bounds, tuple(broken), *((found, ()) if broken else ((), found)))


# The text on which SAEs are checked where the settings name none.


def calibration_text() -> str:
    """General English: stories, dialogue, letters, numbers, a little code. Passages are parted by empty lines."""
    return files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
