"""Who trains, in which environment, and the processes that run."""

from __future__ import annotations

from pathlib import Path

from bench.processes import Worker, WorkerFailed
from bench.roster import OWN, ROOT, Entry
from bench.roster import Pool as Workers

REFERENCE = ROOT / ".venv-reference"
FLOOR, OURS = "floor", "Saeguard"
LIBRARIES = ("SAELens", "dictionary_learning", "sparsify")

ENTRIES: dict[str, Entry] = {
    OURS: Entry("bench.train.own"),
    FLOOR: Entry("bench.train.floor"),
    "SAELens": Entry("bench.train.with_saelens", (), REFERENCE, "make reference-env", {"WANDB_MODE": "disabled"}),
    "dictionary_learning": Entry("bench.train.with_dictionary_learning", (), REFERENCE, "make reference-env"),
    "sparsify": Entry(
        "bench.train.with_sparsify", (), REFERENCE, "make reference-env", {"SPARSIFY_DISABLE_TRITON": "1"}
    ),
}


class Sides(Workers):
    """The workers by side: ``library`` or ``library, what``, a process for each, so that all can train in turn."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "")

    def _start(self, name: str) -> Worker:
        entry = ENTRIES[name.partition(",")[0]]
        python = entry.venv / "bin" / "python"
        if not python.exists():
            raise WorkerFailed(f"needs {entry.venv.name}; {entry.made_by} makes it")
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**quiet, **entry.environment, "PYTHONPATH": str(ROOT / "tests")}
        return Worker([str(python), "-W", "ignore", "-m", entry.module], environment, self.folder / f"{name}.log")


def versions() -> tuple[Path, ...]:
    """Environments whose packages a report names."""
    return OWN, REFERENCE
