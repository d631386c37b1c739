"""What is found of a policy, for the people who write it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing, where it is, and in which policy."""

    policy: str
    field: str
    """Such as ``rules[2].clamp.value``."""
    message: str

    def __str__(self) -> str:
        return f"{self.policy}: {self.field}: {self.message}"
