"""A policy as text: YAML for people, and one canonical JSON for stores and digests. README shows the format.

Both are the fields of ``model`` and ``saeguard.types`` under their own names, without those that are their defaults,
and with shorter forms for edits, conditions and triggers: ``cap: 2`` for the kind and its value, ``above: 3`` for the
comparison and its threshold, ``stop: true`` for the action.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from functools import cache, partial, singledispatch
from itertools import count
from math import isfinite
from pathlib import PurePosixPath
from typing import Any, TypeAlias, TypeVar

import msgspec
import yaml

from saeguard import types
from saeguard.checks import FieldError
from saeguard.types import Apply, Condition, FeatureRef, Intervention, Scope, Term, Trigger, Window
from saeguard_server.policy.model import Pins, Policy, PolicyLimits, Rollout, Rule, Target

T = TypeVar("T")
Tree: TypeAlias = dict[str, Any]
Reader: TypeAlias = Callable[[Any, str], Any]
"""A value from what is written at a path."""


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """``bias + sum of weight * feature``."""

    terms: tuple[Term, ...]
    bias: float


MAX_MESSAGE_CHARS = 1000

ProbeReader: TypeAlias = Callable[[str], LinearProbe]
"""The probe in a file of that name, for conditions that name one. Raises ValueError."""


def no_probes(name: str) -> LinearProbe:
    raise ValueError("files of probes are only read where the policy is read from files")


class BadDocument(ValueError):
    """A text that is no policy. The message names the path, such as ``rules[2].clamp.value``, and quotes a little."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}...")


def read_policy_files(files: Mapping[str, str]) -> tuple[Policy, ...]:
    """The policies of all YAML files, by name. Raises BadDocument, which begins with the file's name."""
    values, probes = count(), cache(partial(probe_in_files, files))
    return tuple(
        policy
        for name in files
        if name.endswith((".yaml", ".yml"))
        for policy in _policies_of_file(name, files[name], partial(probes, name), values)
    )


def _policies_of_file(name: str, text: str, probes: ProbeReader, values: Iterator[int]) -> tuple[Policy, ...]:
    try:
        return policies_from_yaml(text, probes, values)
    except BadDocument as err:
        raise BadDocument(f"{name}: {err}") from err


def policies_from_yaml(
    text: str, probes: ProbeReader = no_probes, values: Iterator[int] | None = None
) -> tuple[Policy, ...]:
    """The policies of a text, one in each YAML document. Raises BadDocument: there is none, or one is wrong.

    Args:
        values: numbers those of the texts that are read together.
    """
    try:
        trees = read_yaml_documents(text, values)
    except BadYaml as err:
        raise BadDocument(str(err)) from err
    if not trees:
        raise BadDocument("holds no policy")
    policies = []
    for number, tree in enumerate(trees, start=1):
        try:
            policies.append(_policy(tree, probes))
        except ValueError as err:
            raise BadDocument(str(err) if len(trees) == 1 else f"document {number}: {err}") from err
    return tuple(policies)


def policy_to_yaml(policy: Policy) -> str:
    return yaml.dump(
        _tree(policy), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )


def canonical_json(policy: Policy) -> str:
    """JSON: the same text for equal policies, with probes written out."""
    return msgspec.json.encode(_tree(policy), order="sorted").decode()


def policy_from_canonical(text: str) -> Policy:
    """The policy of such a text. Raises BadDocument: it is none."""
    try:
        return _policy(msgspec.json.decode(text), no_probes)
    except (msgspec.DecodeError, ValueError, RecursionError) as err:
        raise BadDocument(str(err)) from err


# --- from what is written to a policy. Whatever is wrong is named by its path in the document.

_TARGET = ("sae", "feature")
_EDIT = (*_TARGET, *types.KINDS, "scope")
_CONDITION = (*_TARGET, "terms", "probe", "bias", *types.OPERATORS, "release", "unit", "over", "scope")
_SHARED = {field.name for field in fields(Intervention)}
_OPERANDS = {
    kind: [field.name for field in fields(edit) if field.name not in _SHARED] for kind, edit in types.KINDS.items()
}
"""The fields that only one kind of edit has: none, a factor, or a value and its unit."""
_LIMITED = ("allowed_features", "denied_features", "withheld_features")
_ACTIONS: Mapping[str, types.Action] = {"flag": types.Flag(), "stop": types.Stop()}


def _policy(tree: Any, probes: ProbeReader) -> Policy:
    nullable = ("target", "rollout", "limits", "pins")
    policy = {name: part for name, part in _mapping(tree, "").items() if part is not None or name not in nullable}
    features = partial(_several, partial(_fields, FeatureRef))
    readers: Mapping[str, Reader] = {
        "target": partial(_fields, Target),
        "rollout": partial(_fields, Rollout),
        "rules": partial(_several, partial(_rule, probes=probes)),
        "triggers": partial(_several, partial(_trigger, probes=probes)),
        "limits": partial(_fields, PolicyLimits, readers=dict.fromkeys(_LIMITED, features)),
        "pins": partial(_fields, Pins, readers={"saes": lambda saes, at: tuple(sorted(_mapping(saes, at).items()))}),
        "expires": _time,
    }
    return _fields(Policy, policy, "", readers)


def _rule(tree: Any, path: str, probes: ProbeReader) -> Rule:
    rule = _mapping(tree, path, ("name", *_EDIT, "when"))
    when = None if rule.get("when") is None else _condition(rule["when"], f"{path}.when", probes)
    return _make(Rule, _pick(rule, "name") | {"intervention": _edit(rule, path, when)}, path)


def _trigger(tree: Any, path: str, probes: ProbeReader) -> Trigger:
    trigger = _mapping(tree, path, ("name", "when", "apply", *_ACTIONS))
    actions = [name for name in ("apply", *_ACTIONS) if trigger.get(name) is not None]
    if len(actions) != 1:
        raise FieldError(path, "must have one of flag, stop and apply")
    (name,) = actions
    if name != "apply" and trigger[name] is not True:
        raise FieldError(f"{path}.{name}", "must be true, or left out")
    action = _ACTIONS[name] if name != "apply" else _apply(trigger[name], f"{path}.apply")
    values = _pick(trigger, "name") | {"action": action}
    if "when" in trigger:
        values["when"] = _condition(trigger["when"], f"{path}.when", probes)
    return _make(Trigger, values, path)


def _apply(tree: Any, path: str) -> Apply:
    edits = _several(lambda entry, at: _edit(_mapping(entry, at, _EDIT), at, None), tree, path)
    return _make(Apply, {"interventions": edits}, "", {"interventions": path})


def _edit(edit: Tree, path: str, when: Condition | None) -> Intervention:
    kinds = [kind for kind in types.KINDS if edit.get(kind) is not None]
    if len(kinds) != 1:
        problem = f"must have one of {', '.join(types.KINDS)}"
        raise FieldError(path, f"{problem}, not {' and '.join(kinds)}" if kinds else problem)
    (kind,) = kinds
    operands, value = _OPERANDS[kind], edit[kind]
    if not operands and value is not True:
        raise FieldError(f"{path}.{kind}", "must be true, or left out")
    if isinstance(value, dict) and len(operands) > 1:
        values = _mapping(value, f"{path}.{kind}", operands)
    else:
        values = dict.fromkeys(operands[:1], value)
    renamed = {name: f"{kind}.{name}" for name in operands}
    values |= _pick(edit, *_TARGET) | {"scope": _scope(edit, path), "when": when}
    return _make(types.KINDS[kind], values, path, renamed)


def _condition(tree: Any, path: str, probes: ProbeReader) -> Condition:
    when = _mapping(tree, path, _CONDITION)
    terms, bias = _terms(when, path, probes)
    comparisons = [name for name in types.OPERATORS if when.get(name) is not None]
    if len(comparisons) != 1:
        raise FieldError(path, f"must have one of {', '.join(types.OPERATORS)}")
    (comparison,) = comparisons
    values = {
        "terms": terms,
        "bias": bias,
        "comparison": comparison,
        "threshold": when[comparison],
        "window": _window(when["over"], f"{path}.over") if "over" in when else types.THIS_TOKEN,
        "scope": _scope(when, path),
    }
    return _make(Condition, values | _pick(when, "release", "unit"), path, {"threshold": comparison})


def _terms(when: Tree, path: str, probes: ProbeReader) -> tuple[Sequence[Term], float]:
    is_one_feature = any(when.get(name) is not None for name in _TARGET)
    if is_one_feature + (when.get("terms") is not None) + (when.get("probe") is not None) != 1:
        raise FieldError(path, "must have sae and feature, or terms, or probe")
    bias = 0.0 if when.get("bias") is None else when["bias"]
    if when.get("probe") is not None:
        if when.get("bias") is not None:
            raise FieldError(f"{path}.bias", "is the probe's")
        try:
            linear = probes(when["probe"])
        except (TypeError, ValueError) as err:
            raise FieldError(f"{path}.probe", str(err)) from err
        return linear.terms, linear.bias
    if is_one_feature:
        return (_make(Term, _pick(when, *_TARGET), path),), bias
    return _several(partial(_fields, Term), when["terms"], f"{path}.terms"), bias


def _window(over: Any, path: str) -> Window:
    match over:
        case "this_token" | "any_so_far" | "maximum":
            return Window(over)
        case {"rolling_mean": tokens, **rest} if not rest:
            return _make(Window, {"kind": "rolling_mean", "tokens": tokens}, path, {"tokens": "rolling_mean"})
        case {"k": k, "of": tokens, **rest} if not rest:
            return _make(Window, {"kind": "k_of_n", "tokens": tokens, "k": k}, path, {"tokens": "of"})
    raise FieldError(path, "must be one of this_token, any_so_far, maximum, or have rolling_mean, or k and of")


def _scope(tree: Tree, path: str) -> Scope:
    return Scope() if tree.get("scope") is None else _fields(Scope, tree["scope"], f"{path}.scope")


def _time(text: Any, path: str) -> datetime:
    try:
        time: datetime = msgspec.convert(text, datetime)
        return time if time.tzinfo is None else time.astimezone(UTC)
    except (msgspec.ValidationError, OverflowError) as err:
        raise FieldError(path, str(err)) from err


def _fields(kind: type[T], tree: Any, path: str, readers: Mapping[str, Reader] | None = None) -> T:
    """A value whose fields are written under their own names; those with a reader are values themselves."""
    values = _mapping(tree, path, _names(kind))
    for name, read in (readers or {}).items():
        if values.get(name) is not None:
            values[name] = read(values[name], f"{path}.{name}".lstrip("."))
    return _make(kind, values, path)


def _several(read: Callable[[Any, str], T], entries: Any, path: str) -> tuple[T, ...]:
    if not isinstance(entries, list):
        raise FieldError(path, f"must be a list, got {entries!r}")
    return tuple(read(entry, f"{path}[{index}]") for index, entry in enumerate(entries))


def _mapping(tree: Any, path: str, names: Sequence[str] | None = None) -> Tree:
    """A copy, of which nothing is unknown."""
    problem = ""
    if not isinstance(tree, dict):
        problem = f"must be a mapping, got {tree!r}"
    elif names is not None and (unknown := sorted(tree.keys() - set(names))):
        problem = f"has the unknown field `{unknown[0]}`"
    if problem:
        raise FieldError(path, problem) if path else ValueError(problem)
    return dict(tree)


def _make(kind: Callable[..., T], values: Tree, path: str, renamed: Mapping[str, str] | None = None) -> T:
    """An instance; its own refusals, which name a field, get the path in front."""
    try:
        for field in fields(kind):  # type: ignore[arg-type]
            if field.default is MISSING and field.name not in values:
                raise FieldError(field.name, "must be set")
        return kind(**values)
    except FieldError as err:
        raise FieldError((renamed or {}).get(err.field, err.field), err.problem).within(path) from err


def _pick(tree: Tree, *names: str) -> Tree:
    return {name: tree[name] for name in names if name in tree}


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


# --- from a policy to what is written: the one form of each policy


@singledispatch
def _tree(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_tree(entry) for entry in value]
    return _stated(value) if hasattr(value, "__dataclass_fields__") else value


def _stated(value: Any) -> Tree:
    stated = ((field, getattr(value, field.name)) for field in fields(value))
    return {field.name: _tree(content) for field, content in stated if content != field.default}


@_tree.register
def _(time: datetime) -> str:
    text: str = msgspec.to_builtins(time.astimezone(UTC))
    return text


@_tree.register
def _(pins: Pins) -> Tree:
    return _stated(pins) | ({"saes": dict(pins.saes)} if pins.saes else {})


@_tree.register
def _(rule: Rule) -> Tree:
    return {"name": rule.name, **_tree(rule.intervention)}


@_tree.register
def _(trigger: Trigger) -> Tree:
    action = trigger.action
    edits = _tree(action.interventions) if isinstance(action, Apply) else True
    return {"name": trigger.name, "when": _tree(trigger.when), type(action).__name__.lower(): edits}


@_tree.register
def _(edit: Intervention) -> Tree:
    stated, operands = _stated(edit), _OPERANDS[edit.kind]
    values = _pick(stated, *operands)
    value = values if len(values) > 1 else getattr(edit, operands[0]) if operands else True
    return {"sae": edit.sae, "feature": edit.feature, edit.kind: value, **_pick(stated, "scope", "when")}


@_tree.register
def _(when: Condition) -> Tree:
    stated, first = _stated(when), when.terms[0]
    if len(when.terms) == 1 and first.weight == 1:
        stated |= {"sae": first.sae, "feature": first.feature}
        del stated["terms"]
    stated |= {when.comparison: when.threshold, "over": _over(when.window)}
    if stated["over"] == "this_token":
        del stated["over"]
    return _pick(stated, *_CONDITION)


def _over(window: Window) -> Any:
    if window.kind == "rolling_mean":
        return {"rolling_mean": window.tokens}
    return {"k": window.k, "of": window.tokens} if window.kind == "k_of_n" else window.kind


# --- linear probes from JSON files: weights on the features of an SAE, and a bias, as a training script writes them
#
# {"sae": "mid", "bias": -1.5, "terms": [{"feature": 12, "weight": 0.8, "label": "flattery"}]}
# {"sae": "mid", "bias": -1.5, "weights": [0.0, 0.8, 0.0]}
#
# ``weights`` has one number for each feature, from 0 on; zeros are left out. A term may name another ``sae`` than the
# whole. Labels and a ``description`` are for people.


class BadProbe(ValueError):
    """A file that is no probe; the message names the field."""


def probe_in_files(files: Mapping[str, str], yaml_name: str, name: str) -> LinearProbe:
    """From one of the texts that came with the policy's, in its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"must be a file in the policy's folder, got {name!r}")
    place = str(PurePosixPath(yaml_name).parent / path)
    if place not in files:
        raise ValueError(f"there is no file {place!r}")
    return parse_probe(files[place])


class _ProbeTerm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    feature: int
    weight: float
    sae: str | None = None
    label: str | None = None


class _Probe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sae: str | None = None
    bias: float = 0.0
    terms: tuple[_ProbeTerm, ...] | None = None
    weights: tuple[float, ...] | None = None
    labels: dict[str, str] = {}
    """By feature, as text."""
    description: str = ""


def parse_probe(text: str | bytes) -> LinearProbe:
    """The probe that a JSON text describes. Raises BadProbe: it describes none."""
    try:
        probe = msgspec.json.decode(text, type=_Probe)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as err:
        raise BadProbe(str(err)) from err
    if (probe.terms is None) == (probe.weights is None):
        raise BadProbe("must have one of terms and weights")
    if probe.weights is not None and probe.sae is None:
        raise BadProbe("sae: must be set with weights")
    number = len(probe.terms or ()) + sum(weight != 0 for weight in probe.weights or ())
    if not 1 <= number <= types.MAX_TERMS:
        raise BadProbe(f"must have 1 to {types.MAX_TERMS} weights that are not 0, got {number}")
    if not isfinite(probe.bias):
        raise BadProbe(f"bias: must be a number, got {probe.bias}")
    weights = {f"weights[{i}]": _ProbeTerm(feature=i, weight=w) for i, w in enumerate(probe.weights or ()) if w}
    listed = weights or {f"terms[{i}]": term for i, term in enumerate(probe.terms or ())}
    return LinearProbe(tuple(_probe_term(path, term, probe.sae) for path, term in listed.items()), probe.bias)


def _probe_term(path: str, term: _ProbeTerm, sae: str | None) -> Term:
    name = term.sae or sae
    if name is None:
        raise BadProbe(f"{path}.sae: must be set, here or for the whole probe")
    try:
        return Term(name, term.feature, term.weight)
    except FieldError as err:
        raise BadProbe(str(err.within(path))) from err


# --- the YAML that policies use: the safe subset, where nothing is guessed and nothing is said twice


MAX_CHARS = 4 * 2**20
"""Of one text."""
MAX_DEPTH = 32
MAX_VALUES = 250_000
"""Of all texts that are read together: words, numbers, keys, ends of lists. Reading so many takes about a second."""
MAX_DIGITS = 64
"""Of a number, however it is written."""


class BadYaml(ValueError):
    """Not YAML, or more of YAML than policies use; the message says on which line."""


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_scalar``, or a reader of YAML 1.1, would not take as text; lists are indented."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Lines as lines where every reader agrees what a line is; escapes where somebody might not."""
    is_plain = all(line.isprintable() for line in text.split("\n"))
    style = '"' if not is_plain else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?\Z")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))

_WORDS: Mapping[str, bool | None] = {"": None, "~": None, "null": None, "true": True, "false": False}
_NUMBER = re.compile(
    r"(?P<int>[-+]?(?:0|[1-9][0-9]*))|[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)


def read_yaml_documents(text: str, values: Iterator[int] | None = None) -> list[Any]:
    """Those that are not empty. Raises BadYaml: it is none, is too large, says a key twice, uses anchors or tags."""
    if len(text) > MAX_CHARS:
        raise BadYaml(f"at most {MAX_CHARS} characters, got {len(text)}")
    try:
        events = _plain_events(text, count() if values is None else values)
        trees = [_tree_of(next(events), events) for event in events if isinstance(event, yaml.DocumentStartEvent)]
    except (yaml.YAMLError, UnicodeEncodeError) as err:
        raise BadYaml(_yaml_problem(err)) from err
    return [tree for tree in trees if tree is not None]


def _plain_events(text: str, values: Iterator[int]) -> Iterator[yaml.Event]:
    """What a few lines of could stand for more than memory, the stack or the time allows is refused as it comes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        problem = None
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if next(values) > MAX_VALUES:
            problem = f"all texts together may hold {MAX_VALUES} values"
        elif depth > MAX_DEPTH:
            problem = "is nested too deeply"
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            problem = "anchors and aliases are not supported"
        elif getattr(event, "tag", None) is not None:
            problem = "tags are not supported"
        if problem is not None:
            raise BadYaml(f"{_line(event.start_mark)}: {problem}")
        yield event


def _tree_of(event: yaml.Event, events: Iterator[yaml.Event]) -> Any:
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event)
    if isinstance(event, yaml.SequenceStartEvent):
        entries = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            entries.append(_tree_of(event, events))
        return entries
    tree: Tree = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _scalar(event) if isinstance(event, yaml.ScalarEvent) else None
        if not isinstance(key, str):
            raise BadYaml(f"{_line(event.start_mark)}: a key must be a word")
        if key in tree:
            raise BadYaml(f"{_line(event.start_mark)}: {key!r} is given twice")
        tree[key] = _tree_of(next(events), events)
    return tree


def _scalar(event: yaml.ScalarEvent) -> Any:
    """Only true and false are booleans, so that ``mode: off`` is a word; 012 and 1:30 are no numbers, dates text."""
    is_plain, text = event.implicit[0], event.value
    if not is_plain:
        return text
    if text in _WORDS:
        return _WORDS[text]
    match = _NUMBER.fullmatch(text)
    if match is None:
        return text
    if len(text) > MAX_DIGITS:
        raise BadYaml(f"{_line(event.start_mark)}: a number may have {MAX_DIGITS} digits")
    return int(text) if match["int"] else float(text)


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"


def _yaml_problem(err: Exception) -> str:
    mark = getattr(err, "problem_mark", None)
    problem = getattr(err, "problem", None) or getattr(err, "reason", None) or "is not YAML"
    return f"{_line(mark)}: {problem}" if mark is not None else str(problem)
