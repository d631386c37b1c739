"""Every way in which Saeguard says no, with a stable reason; no gRPC here, the edge maps these to statuses.

SaeguardError
├── InvalidRequest          a field is wrong; names it
├── UnknownName             a model, SAE or feature that is not served; names the field
├── Overloaded              too much at once; says when to come back
├── DeadlineExceeded        the time the caller or the server allowed is over
├── Cancelled               the caller is gone
├── Unavailable             draining, starting, or the engine is down; try elsewhere or later
├── NonFiniteOutput         the model's output for this request is not finite
└── InternalFailure         our bug, including an edit that was promised and not applied
"""

from __future__ import annotations

from typing import ClassVar


class SaeguardError(Exception):
    """Base of everything the service refuses or fails with.

    Attributes:
        reason: stable, upper-case code of the class; what clients and dashboards match on.
        message: one sentence for a person.
    """

    reason: ClassVar[str]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class _FieldError(SaeguardError):
    """An error about one field of the request, such as ``interventions[2].clamp.value``."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message


class InvalidRequest(_FieldError):
    """A field holds what it must not."""

    reason: ClassVar[str] = "INVALID_REQUEST"


class UnknownName(_FieldError):
    """A field names something that is not served here."""

    reason: ClassVar[str] = "UNKNOWN_NAME"


class Overloaded(SaeguardError):
    """The queue is full; nothing was started."""

    reason: ClassVar[str] = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(SaeguardError):
    """The request's time is over; its slot is free again."""

    reason: ClassVar[str] = "DEADLINE_EXCEEDED"


class Cancelled(SaeguardError):
    """The caller went away."""

    reason: ClassVar[str] = "CANCELLED"


class Unavailable(SaeguardError):
    """The service cannot take or finish this now."""

    reason: ClassVar[str] = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NonFiniteOutput(SaeguardError):
    """The model's output for this request became NaN or infinite, as an extreme edit can make it."""

    reason: ClassVar[str] = "NON_FINITE_OUTPUT"


class InternalFailure(SaeguardError):
    """Our bug. The request fails; nothing half-steered is passed off as an answer."""

    reason: ClassVar[str] = "INTERNAL"
