"""Finding the features worth steering: contrast between documents, F1 on tokens, and the re-check on held-out text."""

from saeguard_sae.discover.contrast import auroc, pool
from saeguard_sae.discover.detectors import Detectors, best_detectors, f1_of
from saeguard_sae.discover.search import Candidate, Labelled, rank, search

__all__ = ["Candidate", "Detectors", "Labelled", "auroc", "best_detectors", "f1_of", "pool", "rank", "search"]
