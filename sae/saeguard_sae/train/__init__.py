"""Training SAEs on activations: settings, learners with their losses and kernels, the loop, evaluation."""

from saeguard_sae.train.evaluate import Fit, evaluate
from saeguard_sae.train.learner import Learner, Progress, make_learner
from saeguard_sae.train.loop import shuffled, train
from saeguard_sae.train.settings import SaeSettings

__all__ = ["Fit", "Learner", "Progress", "SaeSettings", "evaluate", "make_learner", "shuffled", "train"]
