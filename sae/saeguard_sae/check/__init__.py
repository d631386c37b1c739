"""The check of an SAE on the model it is served with: measured, compared with bounds, explained when it fails."""

from saeguard_sae.check.bounds import Bounds, bounds_from, violations
from saeguard_sae.check.calibration import calibration_text
from saeguard_sae.check.measure import Measured, measure
from saeguard_sae.check.report import Report, check
from saeguard_sae.check.suspects import Suspect, suspects

__all__ = [
    "Bounds",
    "Measured",
    "Report",
    "Suspect",
    "bounds_from",
    "calibration_text",
    "check",
    "measure",
    "suspects",
    "violations",
]
