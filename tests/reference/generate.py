"""Writes freshly made SAEs with the libraries that define the formats, and what those libraries compute from them.

Runs in the environment of ``make reference-env``, which holds those libraries and none of our packages:
``python generate.py OUT --seed 1 --d-in 40 --d-sae 104``. A case is a folder as its library saves it, with ``ref.npz``
(x, features, recon, forward) in it; ``OUT/cases.json`` lists them. All numbers come from an SAE that its library read
back from disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path


def main() -> None:
    """Reads the arguments and writes every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="an empty folder, or one that does not exist yet")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--d-in", type=int, default=40, help="a multiple of 4, above 16")
    parser.add_argument("--d-sae", type=int, default=104, help="a multiple of 52")
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import other_cases
    import saelens_cases
    import torch
    from writer import Writer

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    given.out.mkdir(parents=True, exist_ok=True)
    writer = Writer(given.out, given.seed, given.d_in, given.d_sae)
    saelens_cases.write(writer)
    other_cases.write(writer)
    writer.list_cases()


if __name__ == "__main__":
    main()
