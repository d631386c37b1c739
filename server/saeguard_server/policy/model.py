"""The nouns: a policy and its rules, a revision of all policies, what is active; valid in themselves once they exist.

Whether features exist and digests match is for ``checking`` to say, which knows what is served.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from typing import Literal, TypeAlias, get_args

from saeguard.types import FeatureRef, Intervention, Trigger, check_edited_once
from saeguard_sae.edits import FLOAT32_MAX

Mode: TypeAlias = Literal["off", "shadow", "enforce"]
MODES: tuple[Mode, ...] = get_args(Mode)
HashBy: TypeAlias = Literal["caller", "conversation"]
HASHED_BY: tuple[HashBy, ...] = get_args(HashBy)

MAX_RULES = 1024
"""Rules of one policy."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whose requests: each list that is not empty must hold the caller, one of its tags, or the model."""

    callers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The share of requests that get it, chosen by a stable hash: the same callers, or conversations, at every replica.

    A share that grows keeps everyone it had. Requests without a conversation are hashed by their caller.
    """

    share: float = 1.0
    by: HashBy = "caller"

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share: must be 0 to 1, got {self.share}")
        if self.by not in HASHED_BY:
            raise ValueError(f"by: must be one of {', '.join(HASHED_BY)}, got {self.by!r}")


@dataclass(frozen=True, slots=True)
class Rule:
    """An edit that the policy makes, by a name that receipts, metrics and refusals use."""

    name: str
    intervention: Intervention

    def __post_init__(self) -> None:
        check_name("name", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLimits:
    """What callers under the policy may do themselves. None allows all that ``denied`` does not name."""

    max_relative_edit: float | None = None
    """Largest ``|edit| / |x|`` per site and token of the caller's own edits."""
    allowed_saes: tuple[str, ...] | None = None
    denied_saes: tuple[str, ...] = ()
    allowed_features: tuple[FeatureRef, ...] | None = None
    denied_features: tuple[FeatureRef, ...] = ()

    def __post_init__(self) -> None:
        limit = self.max_relative_edit
        if limit is not None and not (isfinite(limit) and 0.0 < limit <= FLOAT32_MAX):
            raise ValueError(f"max_relative_edit: must be finite and above 0, got {limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """SHA-256 that the served model and SAEs must have; the policy is refused where they differ."""

    model: str | None = None
    saes: tuple[tuple[str, str], ...] = ()
    """Pairs of an SAE's name and digest, in the order of the names."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.saes]
        if names != sorted(set(names)):
            raise ValueError("saes: must be in the order of their names, each once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A named set of rules and what becomes of requests under it."""

    name: str
    mode: Mode
    description: str = ""
    owner: str = ""
    target: Target = Target()
    rollout: Rollout = Rollout()
    rules: tuple[Rule, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    limits: PolicyLimits = PolicyLimits()
    pins: Pins = Pins()
    expires: datetime | None = None
    """Not in force from then on; with a time zone."""
    counterfactual_share: float = 0.0
    """Share of the requests it edits that are also run without it, to measure the difference."""
    requires_audit: bool = False
    """Whether a request under it fails when its audit record cannot be written."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if self.mode not in MODES:
            raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0.0 <= self.counterfactual_share <= 1.0:
            raise ValueError(f"counterfactual_share: must be 0 to 1, got {self.counterfactual_share}")
        if self.expires is not None and self.expires.tzinfo is None:
            raise ValueError("expires: must have a time zone, such as 2027-01-31T00:00:00Z")
        if not (self.rules or self.triggers or self.limits != PolicyLimits()):
            raise ValueError("rules: a policy must have rules, triggers or limits")
        self._check_names()
        check_edited_once(tuple(rule.intervention for rule in self.rules))

    def _check_names(self) -> None:
        names = [rule.name for rule in self.rules] + [trigger.name for trigger in self.triggers]
        if len(names) > MAX_RULES:
            raise ValueError(f"rules: at most {MAX_RULES} rules and triggers, got {len(names)}")
        for index, trigger in enumerate(self.triggers):
            check_name(f"triggers[{index}].name", trigger.name)
        for name, times in Counter(names).items():
            if times > 1:
                raise ValueError(f"rules: the name {name!r} is given twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRevision:
    """All policies as they were after one change; ``number`` counts from 1 without gaps."""

    number: int
    policies: tuple[Policy, ...]
    """In the order of their names."""
    author: str
    time: datetime
    reason: str


def check_name(field: str, name: str) -> None:
    """Names go into metrics, logs and file names.

    Raises:
        ValueError: not lower-case letters, digits and ``.``, ``_``, ``-`` between them, at most 63.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{field}: must be 1 to 63 of a-z, 0-9 and, not at an end, . _ -; got {name!r}")
