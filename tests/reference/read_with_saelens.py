"""Reads SAEs with SAELens and writes what it computes: ``python read_with_saelens.py FOLDER``.

``FOLDER`` holds one folder for each SAE and ``x.npy`` [sequences, tokens, d_in]; every SAE's folder gets an ``out.npz``
(features, recon, forward). Runs in the environment of ``make reference-env``, which holds none of our packages.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

HEADS = 4


def main(folder: Path) -> None:
    """Every SAE in the folder."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import numpy as np
    import torch
    from sae_lens import SAE

    torch.set_grad_enabled(False)
    x = torch.from_numpy(np.load(folder / "x.npy"))
    for path in sorted(one for one in folder.iterdir() if one.is_dir()):
        sae = SAE.load_from_disk(path)
        # As TransformerLens has the heads' outputs.
        given = x.unflatten(-1, (HEADS, -1)) if sae.cfg.reshape_activations == "hook_z" else x
        features = sae.encode(given)
        # At once: SAELens keeps what it normalised by for the next decode alone.
        recon, forward = sae.decode(features), sae(given.to(sae.dtype))
        arrays = {"features": features, "recon": recon, "forward": forward}
        flat = {name: value.float().reshape(*x.shape[:2], -1).numpy() for name, value in arrays.items()}
        np.savez(path / "out.npz", **flat)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
