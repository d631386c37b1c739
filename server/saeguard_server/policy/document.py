"""A policy as text: YAML for people, and one canonical JSON for stores and digests. README shows the format."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import unified_diff
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

import msgspec
import yaml

from saeguard.types import (
    KINDS,
    OPERATORS,
    PHASES,
    UNITS,
    Action,
    Apply,
    Condition,
    FeatureRef,
    Flag,
    Intervention,
    Operator,
    Phase,
    Scale,
    Scope,
    Stop,
    Term,
    Trigger,
    Unit,
    ValuedIntervention,
    Window,
)
from saeguard_server.policy import probe
from saeguard_server.policy.model import (
    HASHED_BY,
    MODES,
    HashBy,
    Mode,
    Pins,
    Policy,
    PolicyLimits,
    Rollout,
    Rule,
    Target,
)
from saeguard_server.policy.probe import LinearProbe

# What a policy looks like when it is written down: field for field what YAML and JSON hold.


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of them: unknown fields are refused, what is left out is not written."""


class ValueShape(Shape, frozen=True, kw_only=True):
    """A value and what it is measured in; a bare number is raw."""

    value: float
    unit: Unit = "raw"


Valued: TypeAlias = float | ValueShape


class ScopeShape(Shape, frozen=True, kw_only=True):
    """As ``interventions.Scope``."""

    phase: Phase = "all"
    start: int = 0
    end: int | None = None
    include_special_tokens: bool = False


class FeatureShape(Shape, frozen=True, kw_only=True):
    """As ``interventions.FeatureRef``."""

    sae: str
    feature: int


class TermShape(Shape, frozen=True, kw_only=True):
    """As ``interventions.Term``."""

    sae: str
    feature: int
    weight: float = 1.0


class OverShape(Shape, frozen=True, kw_only=True):
    """A window of tokens: ``rolling_mean: 8``, or ``k: 3`` with ``of: 8``."""

    rolling_mean: int | None = None
    k: int | None = None
    of: int | None = None


class ConditionShape(Shape, frozen=True, kw_only=True):
    """One feature, or ``terms`` with a ``bias``, or a ``probe``; one comparison."""

    sae: str | None = None
    feature: int | None = None
    terms: tuple[TermShape, ...] | None = None
    probe: str | None = None
    bias: float | None = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    release: float | None = None
    unit: Unit = "raw"
    over: Literal["this_token", "any_so_far", "maximum"] | OverShape = "this_token"
    scope: ScopeShape | None = None


class EditShape(Shape, frozen=True, kw_only=True):
    """A feature and the one thing that is done to it."""

    sae: str
    feature: int
    zero: bool | None = None
    clamp: Valued | None = None
    scale: float | None = None
    add: Valued | None = None
    cap: Valued | None = None
    floor: Valued | None = None
    scope: ScopeShape | None = None


class RuleShape(EditShape, frozen=True, kw_only=True):
    """An edit with a name, and when it is made."""

    name: str
    when: ConditionShape | None = None


class TriggerShape(Shape, frozen=True, kw_only=True):
    """A condition and the one thing that comes of it."""

    name: str
    when: ConditionShape
    flag: bool | None = None
    stop: bool | None = None
    apply: tuple[EditShape, ...] | None = None


class TargetShape(Shape, frozen=True, kw_only=True):
    """As ``model.Target``."""

    callers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class RolloutShape(Shape, frozen=True, kw_only=True):
    """As ``model.Rollout``."""

    share: float = 1.0
    by: HashBy = "caller"


class LimitsShape(Shape, frozen=True, kw_only=True):
    """As ``model.PolicyLimits``."""

    max_relative_edit: float | None = None
    allowed_saes: tuple[str, ...] | None = None
    denied_saes: tuple[str, ...] = ()
    allowed_features: tuple[FeatureShape, ...] | None = None
    denied_features: tuple[FeatureShape, ...] = ()


class PinsShape(Shape, frozen=True, kw_only=True):
    """As ``model.Pins``."""

    model: str | None = None
    saes: dict[str, str] = {}


class PolicyShape(Shape, frozen=True, kw_only=True):
    """As ``model.Policy``."""

    name: str
    mode: Mode
    description: str = ""
    owner: str = ""
    target: TargetShape | None = None
    rollout: RolloutShape | None = None
    rules: tuple[RuleShape, ...] = ()
    triggers: tuple[TriggerShape, ...] = ()
    limits: LimitsShape | None = None
    pins: PinsShape | None = None
    expires: datetime | None = None
    counterfactual_share: float = 0.0
    requires_audit: bool = False


# From what is written down to the nouns of ``model``; whatever is wrong is named by its path in the document.


ProbeReader: TypeAlias = Callable[[str], LinearProbe]
"""The probe in a file of that name. Raises ValueError."""

_FIELD = re.compile(r"[a-z_]+(\[\d+\])?(\.[a-z_]+(\[\d+\])?)*")


def no_probes(name: str) -> LinearProbe:
    """Where there are no files."""
    raise ValueError("files of probes are only read where the policy is read from files")


def policy_from_shape(shape: PolicyShape, probes: ProbeReader = no_probes) -> Policy:
    """The policy that a document describes.

    Raises:
        ValueError: it describes none; the message begins with the path of what is wrong.
    """
    rules = tuple(_rule(one, f"rules[{index}]", probes) for index, one in enumerate(shape.rules))
    triggers = tuple(_trigger(one, f"triggers[{index}]", probes) for index, one in enumerate(shape.triggers))
    limits = PolicyLimits() if shape.limits is None else _limits(shape.limits)
    with _at("rollout"):
        rollout = Rollout() if shape.rollout is None else Rollout(share=shape.rollout.share, by=shape.rollout.by)
    target, pins = shape.target, shape.pins
    with _at(""):
        return Policy(
            name=shape.name,
            mode=shape.mode,
            description=shape.description,
            owner=shape.owner,
            target=(
                Target() if target is None else Target(callers=target.callers, tags=target.tags, models=target.models)
            ),
            rollout=rollout,
            rules=rules,
            triggers=triggers,
            limits=limits,
            pins=Pins() if pins is None else Pins(model=pins.model, saes=tuple(sorted(pins.saes.items()))),
            expires=shape.expires,
            counterfactual_share=shape.counterfactual_share,
            requires_audit=shape.requires_audit,
        )


def _rule(shape: RuleShape, path: str, probes: ProbeReader) -> Rule:
    when = None if shape.when is None else _condition(shape.when, f"{path}.when", probes)
    edited = _intervention(shape, path, when)
    with _at(path):
        return Rule(shape.name, edited)


def _trigger(shape: TriggerShape, path: str, probes: ProbeReader) -> Trigger:
    when = _condition(shape.when, f"{path}.when", probes)
    action = _action(shape, path)
    with _at(path):
        return Trigger(shape.name, when, action)


def _action(shape: TriggerShape, path: str) -> Action:
    if shape.apply is not None and shape.flag is shape.stop is None:
        edits = [_intervention(one, f"{path}.apply[{index}]", None) for index, one in enumerate(shape.apply)]
        if not edits:
            raise ValueError(f"{path}.apply: must not be empty")
        return Apply(tuple(edits))
    if shape.apply is None and (shape.flag is None) != (shape.stop is None):
        return Stop() if _is_said(shape.stop, f"{path}.stop", shape.flag, f"{path}.flag") else Flag()
    raise ValueError(f"{path}: must have one of flag, stop and apply")


def _is_said(first: bool | None, first_path: str, other: bool | None, other_path: str) -> bool:
    """Which of two is there, of which the one that is there must be true."""
    if first is False or other is False:
        raise ValueError(f"{first_path if first is False else other_path}: must be true, or left out")
    return first is True


def _intervention(shape: EditShape, path: str, when: Condition | None) -> Intervention:
    scope = _scope(shape.scope, f"{path}.scope")
    kinds = [kind for kind in KINDS if getattr(shape, kind) is not None]
    if len(kinds) != 1:
        raise ValueError(f"{path}: must have one of {', '.join(KINDS)}{', not ' if kinds else ''}{' and '.join(kinds)}")
    kind = kinds[0]
    match getattr(shape, kind):
        case False:
            raise ValueError(f"{path}.{kind}: must be true, or left out")
        case True:
            operands: dict[str, Any] = {}
        case ValueShape() as valued:
            operands = {"value": valued.value, "unit": valued.unit}
        case number:
            operands = {"factor" if kind == "scale" else "value": number}
    with _at(path, {name: f"{kind}.{name}" for name in operands}):
        return KINDS[kind](shape.sae, shape.feature, **operands, scope=scope, when=when)


def _scope(shape: ScopeShape | None, path: str) -> Scope:
    if shape is None:
        return Scope()
    with _at(path):
        return Scope(
            phase=shape.phase, start=shape.start, end=shape.end, include_special_tokens=shape.include_special_tokens
        )


def _condition(shape: ConditionShape, path: str, probes: ProbeReader) -> Condition:
    terms, bias = _probe(shape, path, probes)
    comparison, threshold = _comparison(shape, path)
    window = _window(shape.over, f"{path}.over")
    scope = _scope(shape.scope, f"{path}.scope")
    with _at(path, {"threshold": comparison}):
        return Condition(
            terms=terms,
            threshold=threshold,
            comparison=comparison,
            bias=bias,
            release=shape.release,
            unit=shape.unit,
            window=window,
            scope=scope,
        )


def _probe(shape: ConditionShape, path: str, probes: ProbeReader) -> tuple[tuple[Term, ...], float]:
    is_one = shape.sae is not None or shape.feature is not None
    if is_one + (shape.terms is not None) + (shape.probe is not None) != 1:
        raise ValueError(f"{path}: must have sae and feature, or terms, or probe")
    bias = 0.0 if shape.bias is None else shape.bias
    if shape.probe is not None:
        if shape.bias is not None:
            raise ValueError(f"{path}.bias: is the probe's")
        with _at(f"{path}.probe"):
            found = probes(shape.probe)
        return found.terms, found.bias
    if shape.terms is not None:
        return tuple(_term(one, f"{path}.terms[{index}]") for index, one in enumerate(shape.terms)), bias
    if shape.sae is None or shape.feature is None:
        raise ValueError(f"{path}.{'sae' if shape.sae is None else 'feature'}: must be set")
    return (_term(TermShape(sae=shape.sae, feature=shape.feature), path),), bias


def _term(shape: TermShape, path: str) -> Term:
    with _at(path):
        return Term(shape.sae, shape.feature, shape.weight)


def _comparison(shape: ConditionShape, path: str) -> tuple[Operator, float]:
    given = [(name, getattr(shape, name)) for name in OPERATORS if getattr(shape, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{path}: must have one of {', '.join(OPERATORS)}")
    return given[0]


def _window(shape: str | OverShape, path: str) -> Window:
    with _at(path, {"tokens": "rolling_mean"}):
        match shape:
            case "this_token" | "any_so_far" | "maximum":
                return Window(shape)
            case OverShape(rolling_mean=int(tokens), k=None, of=None):
                return Window("rolling_mean", tokens)
    with _at(path, {"tokens": "of"}):
        match shape:
            case OverShape(rolling_mean=None, k=int(k), of=int(tokens)):
                return Window("k_of_n", tokens, k)
    raise ValueError(f"{path}: must be this_token, any_so_far, maximum, or have rolling_mean, or k and of")


def _limits(shape: LimitsShape) -> PolicyLimits:
    allowed = shape.allowed_features
    found = None if allowed is None else _features(allowed, "limits.allowed_features")
    denied = _features(shape.denied_features, "limits.denied_features")
    with _at("limits"):
        return PolicyLimits(
            max_relative_edit=shape.max_relative_edit,
            allowed_saes=shape.allowed_saes,
            denied_saes=shape.denied_saes,
            allowed_features=found,
            denied_features=denied,
        )


def _features(shapes: tuple[FeatureShape, ...], path: str) -> tuple[FeatureRef, ...]:
    found = []
    for index, one in enumerate(shapes):
        with _at(f"{path}[{index}]"):
            found.append(FeatureRef(one.sae, one.feature))
    return tuple(found)


@contextmanager
def _at(path: str, renamed: dict[str, str] | None = None) -> Iterator[None]:
    """Puts a path before the field that a domain class's ``ValueError("field: problem")`` names."""
    try:
        yield
    except ValueError as err:
        field, _, problem = str(err).partition(": ")
        if not problem or not _FIELD.fullmatch(field):
            raise ValueError(f"{path}: {err}") from err
        named = (renamed or {}).get(field, field)
        raise ValueError(f"{f'{path}.{named}'.lstrip('.')}: {problem}") from err


# From the nouns of ``model`` to what is written down: the one form of each policy, with nothing that goes unsaid.


def policy_shape(policy: Policy) -> PolicyShape:
    """How a policy is written down; equal policies alike."""
    target, rollout, pins = policy.target, policy.rollout, policy.pins
    return PolicyShape(
        name=policy.name,
        mode=policy.mode,
        description=policy.description,
        owner=policy.owner,
        target=(
            None if target == Target() else TargetShape(callers=target.callers, tags=target.tags, models=target.models)
        ),
        rollout=None if rollout == Rollout() else RolloutShape(share=float(rollout.share), by=rollout.by),
        rules=tuple(map(_rule_shape, policy.rules)),
        triggers=tuple(map(_trigger_shape, policy.triggers)),
        limits=None if policy.limits == PolicyLimits() else _limits_shape(policy.limits),
        pins=None if pins == Pins() else PinsShape(model=pins.model, saes=dict(pins.saes)),
        expires=None if policy.expires is None else policy.expires.astimezone(UTC),
        counterfactual_share=float(policy.counterfactual_share),
        requires_audit=policy.requires_audit,
    )


def _rule_shape(rule: Rule) -> RuleShape:
    one = rule.intervention
    return RuleShape(name=rule.name, when=None if one.when is None else _condition_shape(one.when), **_edited(one))


def _trigger_shape(trigger: Trigger) -> TriggerShape:
    action = trigger.action
    return TriggerShape(
        name=trigger.name,
        when=_condition_shape(trigger.when),
        flag=True if isinstance(action, Flag) else None,
        stop=True if isinstance(action, Stop) else None,
        apply=tuple(EditShape(**_edited(one)) for one in action.interventions) if isinstance(action, Apply) else None,
    )


def _edited(one: Intervention) -> dict[str, Any]:
    return {
        "sae": one.sae,
        "feature": one.feature,
        one.kind: _operand(one),
        "scope": _scope_shape(one.scope),
    }


def _operand(edit: Intervention) -> bool | Valued:
    if isinstance(edit, ValuedIntervention):
        return float(edit.value) if edit.unit == "raw" else ValueShape(value=float(edit.value), unit=edit.unit)
    return float(edit.factor) if isinstance(edit, Scale) else True


def _scope_shape(scope: Scope) -> ScopeShape | None:
    if scope == Scope():
        return None
    return ScopeShape(
        phase=scope.phase,
        start=scope.start,
        end=scope.end,
        include_special_tokens=scope.include_special_tokens,
    )


def _condition_shape(when: Condition) -> ConditionShape:
    said: dict[str, Any] = {**_terms(when), when.comparison: float(when.threshold)}
    return ConditionShape(
        **said,
        bias=float(when.bias) if when.bias else None,
        release=None if when.release is None else float(when.release),
        unit=when.unit,
        over=_over(when.window),
        scope=_scope_shape(when.scope),
    )


def _terms(when: Condition) -> dict[str, Any]:
    first = when.terms[0]
    if len(when.terms) == 1 and first.weight == 1:
        return {"sae": first.sae, "feature": first.feature}
    terms = (TermShape(sae=term.sae, feature=term.feature, weight=float(term.weight)) for term in when.terms)
    return {"terms": tuple(terms)}


def _over(window: Window) -> Any:
    match window.kind:
        case "rolling_mean":
            return OverShape(rolling_mean=window.tokens)
        case "k_of_n":
            return OverShape(k=window.k, of=window.tokens)
        case other:
            return other


def _limits_shape(limits: PolicyLimits) -> LimitsShape:
    allowed = limits.allowed_features
    return LimitsShape(
        max_relative_edit=None if limits.max_relative_edit is None else float(limits.max_relative_edit),
        allowed_saes=limits.allowed_saes,
        denied_saes=limits.denied_saes,
        allowed_features=None if allowed is None else _feature_shapes(allowed),
        denied_features=_feature_shapes(limits.denied_features),
    )


def _feature_shapes(refs: tuple[FeatureRef, ...]) -> tuple[FeatureShape, ...]:
    return tuple(FeatureShape(sae=one.sae, feature=one.feature) for one in refs)


# YAML as policies use it: the safe subset, where nothing is guessed and nothing is said twice.


MAX_CHARS = 8 * 2**20
"""Of one text."""
MAX_DEPTH = 32


class BadYaml(ValueError):
    """Not YAML, or more of YAML than policies use; the message says on which line."""


class _Loader(yaml.CSafeLoader):
    """Only true and false are booleans, so that ``mode: off`` is a word; 012 and 1:30 are no numbers, dates text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise BadYaml(f"{_line(key.start_mark)}: a key must be a word")
            if key.value in seen:
                raise BadYaml(f"{_line(key.start_mark)}: {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader``, or a reader of YAML 1.1, would not take as text; lists are indented."""

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
_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9]\d*)", list("-+0123456789")),
    ("float", r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT.pattern + r"\Z"), list("-+.0123456789"))


def read_yaml_documents(text: str) -> list[Any]:
    """The documents of a text; empty ones are left out.

    Raises:
        BadYaml: it is none, a key is given twice, or it uses anchors or tags.
    """
    if len(text) > MAX_CHARS:
        raise BadYaml(f"at most {MAX_CHARS} characters, got {len(text)}")
    try:
        _check_events(text)
        return [one for one in yaml.load_all(text, Loader=_Loader) if one is not None]
    except yaml.YAMLError as err:
        raise BadYaml(_yaml_problem(err)) from err


def write_yaml(tree: dict[str, Any]) -> str:
    """One document."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def _check_events(text: str) -> None:
    """Before anything is built: a few aliases can stand for more than memory holds, and deep nesting ends the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise BadYaml(f"{_line(event.start_mark)}: anchors and aliases are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise BadYaml(f"{_line(event.start_mark)}: is nested too deeply")


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"


def _yaml_problem(err: yaml.YAMLError) -> str:
    mark = getattr(err, "problem_mark", None)
    problem = getattr(err, "problem", None) or getattr(err, "reason", None) or "is not YAML"
    return f"{_line(mark)}: {problem}" if mark is not None else str(problem)


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


def read_policy_file(path: Path) -> tuple[Policy, ...]:
    """The policies of a file, with the probes that lie in its folder.

    Raises:
        BadDocument: the message begins with the file's name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise BadDocument(f"{path.name}: {getattr(err, 'strerror', None) or err}") from err
    return _named(path.name, text, partial(_probe_in, path.parent))


def read_policy_files(files: Mapping[str, str]) -> tuple[Policy, ...]:
    """The policies of all YAML files among these texts, by name, with the probes among them.

    Raises:
        BadDocument: the message begins with the file's name.
    """
    names = [name for name in files if name.endswith((".yaml", ".yml"))]
    return tuple(policy for name in names for policy in _named(name, files[name], partial(_probe_of, files, name)))


def policies_from_yaml(text: str, probes: ProbeReader = no_probes) -> tuple[Policy, ...]:
    """The policies of a text, one in each YAML document.

    Raises:
        BadDocument: there is none, or one is wrong.
    """
    try:
        trees = read_yaml_documents(text)
    except BadYaml as err:
        raise BadDocument(str(err)) from err
    if not trees:
        raise BadDocument("holds no policy")
    is_one = len(trees) == 1
    return tuple(_policy(tree, "" if is_one else f"document {index + 1}", probes) for index, tree in enumerate(trees))


def policy_to_yaml(policy: Policy) -> str:
    """One YAML document."""
    tree = msgspec.to_builtins(policy_shape(policy))
    for rule in (*tree.get("rules", ()), *tree.get("triggers", ())):
        name = rule.pop("name")
        rest = dict(rule)
        rule.clear()
        rule.update({"name": name, **rest})
    return write_yaml(tree)


def canonical_json(policy: Policy) -> str:
    """JSON: the same text for equal policies, with probes written out."""
    return msgspec.json.encode(policy_shape(policy), order="sorted").decode()


def policy_from_canonical(text: str) -> Policy:
    """The policy of such a text.

    Raises:
        BadDocument: it is none.
    """
    try:
        return policy_from_shape(msgspec.json.decode(text, type=PolicyShape))
    except msgspec.ValidationError as err:
        raise BadDocument(_said(err)) from err
    except (ValueError, RecursionError) as err:
        raise BadDocument(str(err)) from err


def _named(name: str, text: str, probes: ProbeReader) -> tuple[Policy, ...]:
    try:
        return policies_from_yaml(text, probes)
    except BadDocument as err:
        raise BadDocument(f"{name}: {err}") from err


def _policy(tree: Any, which: str, probes: ProbeReader) -> Policy:
    try:
        return policy_from_shape(msgspec.convert(tree, PolicyShape), probes)
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
    return probe.parse_probe(text)


def _probe_of(files: Mapping[str, str], yaml_name: str, name: str) -> LinearProbe:
    path = str(PurePosixPath(yaml_name).parent / _relative(name))
    if path not in files:
        raise ValueError(f"there is no file {path!r}")
    return probe.parse_probe(files[path])


def _relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"must be a file in the policy's folder, got {name!r}")
    return path


# What differs between two sets of policies, for people: which policies, and their lines.


ChangeKind: TypeAlias = Literal["created", "changed", "deleted"]


@dataclass(frozen=True, slots=True)
class PolicyDiff:
    """One policy that was made, changed or deleted."""

    name: str
    kind: ChangeKind
    diff: str
    """Unified, of the policy's YAML."""


def policy_changes(before: Sequence[Policy], after: Sequence[Policy]) -> tuple[PolicyDiff, ...]:
    """The policies that differ, in the order of their names."""
    old, new = ({policy.name: policy for policy in side} for side in (before, after))
    pairs = ((name, old.get(name), new.get(name)) for name in sorted(old | new))
    return tuple(_change(name, one, other) for name, one, other in pairs if _differ(one, other))


def _differ(old: Policy | None, new: Policy | None) -> bool:
    if old is None or new is None:
        return True
    # What is not written down, such as the size of a window that has none, is no difference.
    return old != new and canonical_json(old) != canonical_json(new)


def _change(name: str, old: Policy | None, new: Policy | None) -> PolicyDiff:
    kind: ChangeKind = "created" if old is None else "deleted" if new is None else "changed"
    lines = unified_diff(_lines(old), _lines(new), f"{name} before", f"{name} after")
    return PolicyDiff(name, kind, "".join(lines))


def _lines(policy: Policy | None) -> list[str]:
    return [] if policy is None else policy_to_yaml(policy).splitlines(keepends=True)
