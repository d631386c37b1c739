"""What a loaded SAE's conventions say that its weights do not."""

from __future__ import annotations

from typing import get_args

from saeguard_sae import releases
from saeguard_sae.binding import USER
from saeguard_sae.formats.found import Choices, Convention, Processing
from saeguard_sae.loading import LoadedSae

_SCALE = "activation scale"
"""What formats call the factor that is folded into the weights."""


def convention(sae: LoadedSae, name: str) -> Convention | None:
    """A convention by its name, as it was decided last when the SAE was loaded."""
    return next((one for one in reversed(sae.conventions) if one.name == name), None)


def processing(sae: LoadedSae) -> Processing | None:
    """How the model was changed that it was trained on; None where nobody said so and it does not matter."""
    known = convention(sae, "processing")
    if known is None:
        return "none"
    return next((one for one in get_args(Processing) if one == known.value), None)


def scale(sae: LoadedSae) -> float:
    """The factor that takes activations to the scale of training, folded into the weights; 1 for none."""
    known = convention(sae, _SCALE)
    try:
        return 1.0 if known is None else float(known.value)
    except ValueError:  # "none", or that of each token
        return 1.0


def asks_for_scale(sae: LoadedSae) -> bool:
    """Whether the settings can say another factor; where files state it or have none, the format refuses it."""
    known = convention(sae, _SCALE)
    return known is not None and known.source in (Choices().scale_said_by, USER, releases.source())


def gating(sae: LoadedSae) -> str | None:
    """Whose rule decides what fires, where there are two."""
    known = convention(sae, "gating")
    return None if known is None else known.value.partition(":")[0]
