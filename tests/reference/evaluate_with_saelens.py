"""What SAELens' ``run_evals`` says of an SAE on a model: ``python evaluate_with_saelens.py FOLDER``.

``FOLDER`` holds ``model`` (a small Llama), ``sae`` and ``tokens.npy`` [rows, tokens]. Prints one JSON line. Runs in the
environment of ``make reference-env``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock


def main(folder: Path) -> None:
    """Everything that it can measure."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    # The environment leaves plots out; importing the package asks for them, drawing nothing.
    sys.modules.update({name: MagicMock() for name in ("plotly", "plotly.graph_objects", "plotly.subplots")})
    import numpy as np
    import torch
    from sae_lens import SAE
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sites import as_hooked
    from transformers import LlamaForCausalLM

    torch.set_grad_enabled(False)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rows, context = tokens.shape
    store = SimpleNamespace(
        get_batch_tokens=lambda count: tokens[:count],
        reset_input_dataset=lambda: None,
        context_size=context,
        store_batch_size_prompts=rows,
    )
    found, features = run_evals(
        SAE.load_from_disk(folder / "sae"),
        store,
        as_hooked("llama", LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval()),
        ActivationScaler(),
        get_eval_everything_config(rows, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1),
        exclude_special_tokens=False,
    )
    flat = {name: value for group in found.values() for name, value in group.items()}
    sys.stdout.write(json.dumps(flat | {"density": features["feature_density"]}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
