"""Training SAEs on activations: settings, learners with their losses and kernels, the loop, evaluation."""

from saeguard_sae.train.evaluate import Fit, evaluate
from saeguard_sae.train.learner import Learner, make_learner
from saeguard_sae.train.loop import shuffled, train
from saeguard_sae.train.settings import SaeSettings
from saeguard_sae.train.tracking import Progress

__all__ = ["Fit", "Learner", "Progress", "SaeSettings", "evaluate", "make_learner", "shuffled", "train"]
