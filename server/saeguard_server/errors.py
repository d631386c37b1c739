"""Every way in which Saeguard says no, with a stable reason; no gRPC here: ``rpc.interceptor`` maps these to statuses.

SaeguardError
├── InvalidRequest          a field is wrong; names it
├── UnknownName             a model, SAE or feature that is not served; names the field
├── Unauthenticated         nobody knows who calls
├── PermissionDenied        the caller is known and may not; names the role that it needs
├── PolicyRefusal           a field asks for what a policy does not allow; names field, policy and rule
├── QuotaExceeded           the caller's own share is used up; says which, and when to come back if that helps
├── Conflict                what the caller read has changed since; read it again
├── ReadOnlyStore           policies are kept where this server may not write
├── NotConfigured           this server was started without what the call is about
├── Overloaded              too much at once; says when to come back
├── DeadlineExceeded        the time the caller or the server allowed is over
├── Cancelled               the caller is gone
├── Unavailable             draining, starting, or the engine is down; try elsewhere or later
├── PoliciesUnavailable     what must be enforced is not known, so nothing is served
├── ActivationNotReached    the policies that the caller demands were not in force in time
├── NonFiniteOutput         the model's output for this request is not finite
└── InternalFailure         our bug, including an edit that was promised and not applied
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar


class SaeguardError(Exception):
    """Base of everything the service refuses or fails with.

    Attributes:
        reason: stable, upper-case code of the class; what clients and dashboards match on.
        message: one sentence for a person.
        facts: what clients may want beside the reason, by name.
        retry_after_s: when to come back, where that helps.
    """

    reason: ClassVar[str]
    facts: Mapping[str, str] = MappingProxyType({})
    retry_after_s: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses' constructors take other arguments than exceptions are pickled with.
        return _rebuild, (type(self), self.args, vars(self))


def _rebuild(kind: type[SaeguardError], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> SaeguardError:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class RequestFieldError(SaeguardError):
    """An error about one field of the request, such as ``interventions[2].clamp.value``."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message


class InvalidRequest(RequestFieldError):
    """A field holds what it must not."""

    reason: ClassVar[str] = "INVALID_REQUEST"


class UnknownName(RequestFieldError):
    """A field names something that is not served here."""

    reason: ClassVar[str] = "UNKNOWN_NAME"


class Unauthenticated(SaeguardError):
    """The caller showed nothing, too much, or what is not accepted; the message never quotes it."""

    reason: ClassVar[str] = "UNAUTHENTICATED"


class PermissionDenied(SaeguardError):
    """The caller has not the role that this needs."""

    reason: ClassVar[str] = "PERMISSION_DENIED"

    def __init__(self, message: str, role: str) -> None:
        super().__init__(message)
        self.role, self.facts = role, {"role": role}


class PolicyRefusal(RequestFieldError):
    """A policy does not allow what a field asks for."""

    reason: ClassVar[str] = "POLICY_REFUSED"

    def __init__(self, field: str, message: str, *, policy: str, rule: str = "") -> None:
        whose = f"rule {rule!r} of policy {policy!r}" if rule else f"policy {policy!r}"
        super().__init__(field, f"{whose} does not allow it: {message}")
        self.facts = {"policy": policy} | ({"rule": rule} if rule else {})


class QuotaExceeded(SaeguardError):
    """The caller's own quota; others are served meanwhile. Without ``retry_after_s`` this request never fits."""

    reason: ClassVar[str] = "QUOTA_EXCEEDED"

    def __init__(self, message: str, quota: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.quota, self.facts = quota, {"quota": quota}
        self.retry_after_s = retry_after_s


class Conflict(SaeguardError):
    """Somebody else was first; nothing was written."""

    reason: ClassVar[str] = "CONFLICT"


class ReadOnlyStore(SaeguardError):
    """Policies come from files that somebody else writes."""

    reason: ClassVar[str] = "READ_ONLY_STORE"


class NotConfigured(SaeguardError):
    """The settings leave out what the call is about."""

    reason: ClassVar[str] = "NOT_CONFIGURED"


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


class PoliciesUnavailable(Unavailable):
    """No policies, stale ones, or some that cannot be applied here: nothing is served without them."""

    reason: ClassVar[str] = "POLICIES_UNAVAILABLE"


class ActivationNotReached(SaeguardError):
    """Policies as new as the caller demands were not in force here before its deadline."""

    reason: ClassVar[str] = "ACTIVATION_NOT_REACHED"


class NonFiniteOutput(SaeguardError):
    """The model's output for this request became NaN or infinite, as an extreme edit can make it."""

    reason: ClassVar[str] = "NON_FINITE_OUTPUT"


class InternalFailure(SaeguardError):
    """Our bug. The request fails; nothing half-steered is passed off as an answer."""

    reason: ClassVar[str] = "INTERNAL"
