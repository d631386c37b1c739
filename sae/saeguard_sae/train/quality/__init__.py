"""How good an SAE is: measured on a model with a frozen baseline beside it, and a report that a person reads."""

from saeguard_sae.train.quality.batch import Row
from saeguard_sae.train.quality.evaluate import Material, evaluate
from saeguard_sae.train.quality.evaluation import Evaluation, Figures, read
from saeguard_sae.train.quality.probes import read_labelled
from saeguard_sae.train.quality.report import write
from saeguard_sae.train.quality.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "Evaluation", "Figures", "Material", "Row", "evaluate", "read", "read_labelled", "write"]
