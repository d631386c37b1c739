"""Settings of policies: where they live, and how long a server may go without hearing of them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

NO_STORE = "none"
STORES = ("sqlite:///", "postgresql://", "directory:")
_POLLS = 3
"""Attempts that must fit before what is known counts as stale."""

# The check stands above the class: its defaults are built, and checked, at import.


def _check(settings: PolicySettings) -> None:
    if settings.store != NO_STORE and not settings.store.startswith(STORES):
        raise ValueError(f"store: must be {NO_STORE!r} or begin with one of {', '.join(STORES)}")
    # Turned round, for NaN.
    if not settings.stale_after_s >= _POLLS * settings.poll_s:
        raise ValueError(f"stale_after_s: must be at least {_POLLS} times poll_s, which is {settings.poll_s:g}")


class PolicySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is enforced on everybody's requests."""

    store: Annotated[str, Meta(min_length=1)] = NO_STORE
    """"none"; "sqlite:///PATH", a file for one server; "postgresql://USER@HOST/DATABASE", for several (extra
    "postgres"; the password comes as libpq finds it, never from here); or "directory:PATH", YAML that is only read."""
    poll_s: Annotated[float, Meta(ge=0.05, le=3600.0)] = 1.0
    """Time between looks at the store; Postgres also calls when something changes."""
    stale_after_s: Annotated[float, Meta(gt=0.0, le=86_400.0)] = 30.0
    """Without a successful look for so long, requests are refused."""
    second_person: bool = False
    """Whether a revision must be put in force by somebody else than its authors."""

    def __post_init__(self) -> None:
        _check(self)
