"""Draws from SAELens' synthetic model and measures with its measures: ``python truth_with_saelens.py FOLDER``.

``FOLDER`` holds ``given.npz`` (often, factor, mean, spread of a truth; decoder, directions, features, strength to be
compared) and gets ``found.npz``. Runs in the environment of ``make reference-env``, which holds none of our packages.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from unittest.mock import MagicMock

TOKENS, ROOTS = 40_000, 8


def main(folder: Path) -> None:
    """Everything that the test looks at."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    # The environment leaves plots out; importing the package asks for them, drawing nothing.
    sys.modules.update({name: MagicMock() for name in ("plotly", "plotly.graph_objects", "plotly.subplots")})
    import numpy as np
    import torch
    from sae_lens.synthetic import evals
    from sae_lens.synthetic.activation_generator import ActivationGenerator
    from sae_lens.synthetic.firing_probabilities import zipfian_firing_probabilities
    from sae_lens.synthetic.hierarchy import HierarchyConfig, generate_hierarchy

    torch.manual_seed(31)
    given = {name: torch.from_numpy(value) for name, value in np.load(folder / "given.npz").items()}
    features = len(given["often"])
    trees = HierarchyConfig(
        total_root_nodes=ROOTS,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
    )
    hierarchy = generate_hierarchy(features, trees, seed=32)
    factors = hierarchy.compute_probability_correction_factors(given["often"])
    generator = ActivationGenerator(
        features,
        (given["often"] * factors).clamp(max=1.0),
        given["spread"],
        given["mean"],
        modify_activations=hierarchy.modifier,
        correlation_matrix=(given["factor"], 1 - given["factor"].square().sum(1)),
    )
    drawn = generator.sample(TOKENS)
    detection = evals.compute_classification_metrics(
        given["features"], given["strength"], given["decoder"], given["directions"]
    )
    np.savez(
        folder / "found.npz",
        often=zipfian_firing_probabilities(features, 0.5, 0.4, 5e-4).numpy(),
        compensation=factors.numpy(),
        rate=(drawn > 0).float().mean(0).numpy(),
        strength=drawn.sum(0).numpy(),
        together=((drawn[:, :ROOTS] > 0).float().T @ (drawn[:, :ROOTS] > 0).float() / TOKENS).numpy(),
        fired=(drawn > 0).float().sum(1).numpy(),
        mcc=evals.mean_correlation_coefficient(given["decoder"], given["directions"]),
        uniqueness=evals.feature_uniqueness(given["decoder"], given["directions"]),
        precision=detection.precision,
        recall=detection.recall,
        f1=detection.f1_score,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
