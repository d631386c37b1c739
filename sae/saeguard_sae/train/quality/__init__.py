"""How good an SAE is: measured on a model with a frozen baseline beside it, and a report that a person reads."""

from saeguard_sae.train.quality.evaluate import (
    EvaluateSettings,
    Evaluation,
    QualityMetrics,
    evaluate_saes,
    read_evaluation,
)
from saeguard_sae.train.quality.material import EvaluationRow, Material
from saeguard_sae.train.quality.probes import read_labelled
from saeguard_sae.train.quality.report import write_report

__all__ = [
    "EvaluateSettings",
    "Evaluation",
    "EvaluationRow",
    "Material",
    "QualityMetrics",
    "evaluate_saes",
    "read_evaluation",
    "read_labelled",
    "write_report",
]
