"""What a policy looks like when it is written down: field for field what YAML and JSON hold."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, TypeAlias

import msgspec

from saeguard_sae.edits import Unit
from saeguard_server.guard.policy.model import HashBy, Mode
from saeguard_server.interventions import Phase


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
    """As ``model.Limits``."""

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
