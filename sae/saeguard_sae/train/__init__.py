"""Training an SAE on activations: settings, the learner with its losses, the loop, evaluation."""

from saeguard_sae.train.evaluate import Fit, evaluate
from saeguard_sae.train.learner import Learner
from saeguard_sae.train.loop import shuffled, train
from saeguard_sae.train.settings import TrainSettings

__all__ = ["Fit", "Learner", "TrainSettings", "evaluate", "shuffled", "train"]
