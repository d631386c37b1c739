"""Training SAEs on activations: settings, learners with their losses and kernels."""

from saeguard_sae.train.learner import Learner, make_learner
from saeguard_sae.train.settings import SaeSettings
from saeguard_sae.train.tracking import Progress

__all__ = ["Learner", "Progress", "SaeSettings", "make_learner"]
