"""Small policies, and stores to put them in."""

from __future__ import annotations

from saeguard.types import Cap
from saeguard_server.policy.model import Mode, Policy, Rule


def a_policy(name: str = "calm", value: float = 1.0, mode: Mode = "enforce") -> Policy:
    """One that caps one feature."""
    return Policy(name=name, mode=mode, rules=(Rule("cap", Cap("mid", 2, value)),))
