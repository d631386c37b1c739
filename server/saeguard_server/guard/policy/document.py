"""A policy as text: YAML for people, and one canonical JSON for stores and digests. README shows the format."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from saeguard_sae.edits import UNITS
from saeguard_server.guard.policy import probe, reading, writing, yaml_text
from saeguard_server.guard.policy.model import HASHED_BY, MODES, Policy
from saeguard_server.guard.policy.probe import LinearProbe
from saeguard_server.guard.policy.reading import ProbeReader
from saeguard_server.guard.policy.shapes import PolicyShape
from saeguard_server.interventions import PHASES

_WORDS: Mapping[str, tuple[str, ...]] = {
    "mode": MODES,
    "by": HASHED_BY,
    "unit": UNITS,
    "phase": PHASES,
    "over": ("this_token", "any_so_far", "maximum", "or have rolling_mean, or k and of"),
}
"""What a field may hold, where that is a closed list of words."""


class BadDocument(ValueError):
    """A text that is no policy. The message names the path, such as ``rules[2].clamp.value``."""


def read_yaml(path: Path) -> tuple[Policy, ...]:
    """The policies of a file, with the probes that lie in its folder.

    Raises:
        BadDocument: the message begins with the file's name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise BadDocument(f"{path.name}: {getattr(err, 'strerror', None) or err}") from err
    return _named(path.name, text, partial(_probe_in, path.parent))


def read_files(files: Mapping[str, str]) -> tuple[Policy, ...]:
    """The policies of all YAML files among these texts, by name, with the probes among them.

    Raises:
        BadDocument: the message begins with the file's name.
    """
    names = [name for name in files if name.endswith((".yaml", ".yml"))]
    return tuple(policy for name in names for policy in _named(name, files[name], partial(_probe_of, files, name)))


def from_yaml(text: str, probes: ProbeReader = reading.no_probes) -> tuple[Policy, ...]:
    """The policies of a text, one in each YAML document.

    Raises:
        BadDocument: there is none, or one is wrong.
    """
    try:
        trees = yaml_text.read(text)
    except yaml_text.BadYaml as err:
        raise BadDocument(str(err)) from err
    if not trees:
        raise BadDocument("holds no policy")
    is_one = len(trees) == 1
    return tuple(_policy(tree, "" if is_one else f"document {index + 1}", probes) for index, tree in enumerate(trees))


def to_yaml(policy: Policy) -> str:
    """One YAML document."""
    tree = msgspec.to_builtins(writing.shape(policy))
    for rule in (*tree.get("rules", ()), *tree.get("triggers", ())):
        name = rule.pop("name")
        rest = dict(rule)
        rule.clear()
        rule.update({"name": name, **rest})
    return yaml_text.write(tree)


def to_canonical(policy: Policy) -> str:
    """JSON: the same text for equal policies, with probes written out."""
    return msgspec.json.encode(writing.shape(policy), order="sorted").decode()


def from_canonical(text: str) -> Policy:
    """The policy of such a text.

    Raises:
        BadDocument: it is none.
    """
    try:
        return reading.policy(msgspec.json.decode(text, type=PolicyShape))
    except msgspec.ValidationError as err:
        raise BadDocument(_said(err)) from err
    except (ValueError, RecursionError) as err:
        raise BadDocument(str(err)) from err


def _named(name: str, text: str, probes: ProbeReader) -> tuple[Policy, ...]:
    try:
        return from_yaml(text, probes)
    except BadDocument as err:
        raise BadDocument(f"{name}: {err}") from err


def _policy(tree: Any, which: str, probes: ProbeReader) -> Policy:
    try:
        return reading.policy(msgspec.convert(tree, PolicyShape), probes)
    except msgspec.ValidationError as err:
        raise BadDocument(_joined(which, _said(err))) from err
    except ValueError as err:
        raise BadDocument(_joined(which, str(err))) from err


def _joined(which: str, what: str) -> str:
    return f"{which}: {what}" if which else what


def _said(err: msgspec.ValidationError) -> str:
    """With the path in front, as everywhere else."""
    problem, _, where = str(err).rpartition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    name = path.rpartition(".")[2]
    if problem.startswith("Invalid enum value") and name in _WORDS:
        problem = f"must be one of {', '.join(_WORDS[name])}"
    return _joined(path, problem) if problem else str(err)


def _probe_in(folder: Path, name: str) -> LinearProbe:
    path = folder / _relative(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is outside the policy's folder")
    try:
        text = path.read_bytes()
    except OSError as err:
        raise ValueError(f"{name!r}: {err.strerror}") from err
    return probe.parse(text)


def _probe_of(files: Mapping[str, str], yaml_name: str, name: str) -> LinearProbe:
    path = str(PurePosixPath(yaml_name).parent / _relative(name))
    if path not in files:
        raise ValueError(f"there is no file {path!r}")
    return probe.parse(files[path])


def _relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"must be a file in the policy's folder, got {name!r}")
    return path
