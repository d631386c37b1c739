"""The configuration of a run: one frozen tree, built once from TOML and flags. Unknown keys are refused by name."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_origin, get_type_hints

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from saeguard_sae.train.lm import ModelSettings
from saeguard_sae.train.run.entries import SaeEntry, entries
from saeguard_sae.train.run.errors import BadConfig
from saeguard_sae.train.run.keys import converted, names_of, refuse_unknown, table
from saeguard_sae.train.stream_settings import DataSettings, StreamSettings

Text: TypeAlias = Annotated[str, Meta(min_length=1)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=2**53)]
Seed: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
T = TypeVar("T")


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long it runs, and what it leaves behind."""

    out: Text
    """Folder of the run: checkpoints, metrics, SAEs. It must be empty or not be there, unless the run is resumed."""
    tokens: Count
    """Tokens that every SAE learns from, rounded up to whole batches."""
    log_every: Count = 100
    """Steps between two lines of figures."""
    checkpoint_every: Count = 1000
    """Steps between two checkpoints."""
    keep: Count = 2
    """Checkpoints that are kept, the newest."""
    seed: Seed = 0
    """Of everything that names no seed of its own."""
    threads: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """CPU threads for torch; by default its own choice."""
    evaluate: bool = True
    """Whether every SAE is evaluated at the end, and a report written."""
    heldout: Count = 200
    """Documents at the start of the data that are evaluated on, and no SAE learns from; none where evaluate is off."""


class ParallelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How several processes that torchrun starts share the work. The outcome is the same within rounding."""

    shards: Count = 1
    """Parts into which every SAE's features are cut, for SAEs that do not fit one device; the number of processes is a
    multiple of it. What is left of them, processes / shards, deals out each batch's tokens."""


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run: a model, a stream of its activations, and all SAEs that learn from it."""

    model: ModelSettings | None
    """None where the data is cached activations."""
    data: DataSettings
    stream: StreamSettings
    run: RunSettings
    parallel: ParallelSettings = ParallelSettings()
    saes: tuple[SaeEntry, ...]

    def __post_init__(self) -> None:
        if not self.saes:
            raise ValueError("saes: at least one [[saes]] is needed")
        names = [one.name for one in self.saes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"saes: the name {name!r} is given twice")

    @property
    def training_data(self) -> DataSettings:
        """Without what is held out."""
        return replace(self.data, skip=self.data.skip + self.run.heldout) if self.run.evaluate else self.data

    @property
    def heldout_data(self) -> DataSettings:
        """What is held out, alone."""
        return replace(self.data, limit=self.run.heldout)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return -(-self.run.tokens // self.stream.batch)


_TABLES: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "stream": StreamSettings,
    "run": RunSettings,
    "parallel": ParallelSettings,
}


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration of a TOML file with ``overrides``, a tree of the same shape, on top.

    Raises:
        BadConfig: it cannot be read, an unknown key, a wrong type, a value out of range.
    """
    tree = _read(path)
    for name, above in (overrides or {}).items():
        tree[name] = {**table(name, tree.get(name, {})), **above}
    try:
        return parse(tree)
    except BadConfig as err:
        raise BadConfig(f"{path}: {err}") from err


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """A tree in the shape of the TOML file -> the configuration.

    Raises:
        BadConfig: names the key.
    """
    refuse_unknown("", tree, [*_TABLES, "saes"])
    parts = {name: dict(table(name, tree.get(name, {}))) for name in _TABLES}
    for name, part in parts.items():
        refuse_unknown(name, part, names_of(_TABLES[name]))
    run = _convert("run", parts["run"], RunSettings)
    if "seed" in names_of(StreamSettings):
        parts["stream"].setdefault("seed", run.seed)
    try:
        return RunConfig(
            model=_convert("model", parts["model"], ModelSettings) if "model" in tree else None,
            data=_convert("data", parts["data"], DataSettings),
            stream=_convert("stream", parts["stream"], StreamSettings),
            run=run,
            parallel=_convert("parallel", parts["parallel"], ParallelSettings),
            saes=entries(tree.get("saes", []), run.seed),
        )
    except BadConfig:
        raise
    except ValueError as err:
        raise BadConfig(str(err)) from err


def plain(config: RunConfig) -> dict[str, Any]:
    """As JSON gives it back, SAEs by their names."""
    tree: dict[str, Any] = {name: msgspec.to_builtins(getattr(config, name)) for name in _TABLES}
    tree["saes"] = {one.name: msgspec.to_builtins(one) for one in config.saes}
    return dict(json.loads(json.dumps(tree)))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decides the outcome of a run and is not the same in two ``plain`` configurations, a sentence each."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in sorted(old | new) if key not in _WITHOUT_EFFECT and old.get(key) != new.get(key)]
    return [f"{key} was {_shown(old, key)}, now is {_shown(new, key)}" for key in keys]


_WITHOUT_EFFECT = {
    "model.device",
    "model.threads",
    "parallel.shards",
    *(f"run.{one}" for one in ("out", "log_every", "checkpoint_every", "keep", "threads")),
}
"""Keys that may change when a run is resumed."""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not given"


def _convert(name: str, part: Mapping[str, Any], kind: type[T]) -> T:
    hints = get_type_hints(kind)
    for key, value in part.items():
        if get_origin(hints[key]) is Literal:
            converted(f"{name}.{key}", value, hints[key])
    whole: T = converted(name, part, kind)
    return whole


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise BadConfig(f"{path}: {err.strerror}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise BadConfig(f"{path}: {err}") from err
