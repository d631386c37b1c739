"""The one table of what each RPC needs, and the checks against it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeAlias

from saeguard_server.caller import Caller, Role
from saeguard_server.errors import PermissionDenied


class Anybody(Enum):
    """Who else than the holder of a role."""

    AT_ALL = "at all"
    """Nobody is asked who calls."""
    WHO_IS_KNOWN = "who is known"
    """Every caller that the server knows, whatever its roles."""


Need: TypeAlias = Role | Anybody

Table: TypeAlias = Mapping[str, Need]
"""By gRPC's name of the method."""

_NEEDS: Mapping[str, Mapping[str, Need]] = {
    "saeguard.v1.GenerationService": {
        "Generate": Role.GENERATE,
        "GenerateStream": Role.GENERATE,
        # It tells what the model says without what policies enforce: for those who could lift a policy anyway.
        "Compare": Role.POLICY_WRITE,
    },
    "saeguard.v1.ActivationService": {
        "GetActivations": Role.OBSERVE,
    },
    "saeguard.v1.CatalogService": {
        "GetModel": Role.OBSERVE,
        "ListSaes": Role.OBSERVE,
        "GetFeature": Role.OBSERVE,
        "ListFeatures": Role.OBSERVE,
    },
    "saeguard.v1.PolicyService": {
        "ListPolicies": Role.POLICY_READ,
        "ListHistory": Role.POLICY_READ,
        "DeletePolicy": Role.POLICY_WRITE,
        "ApplyPolicies": Role.POLICY_WRITE,
        "ActivateRevision": Role.POLICY_WRITE,
        "Rollback": Role.POLICY_WRITE,
    },
    "saeguard.v1.ServerInfoService": {
        "GetServerInfo": Anybody.WHO_IS_KNOWN,
    },
    "grpc.health.v1.Health": {
        "Check": Anybody.AT_ALL,
        "Watch": Anybody.AT_ALL,
    },
}

_SECOND_PERSON: Table = {
    "/saeguard.v1.PolicyService/ActivateRevision": Role.POLICY_APPROVE,
    "/saeguard.v1.PolicyService/Rollback": Role.POLICY_APPROVE,
    "/saeguard.v1.GenerationService/Compare": Role.POLICY_APPROVE,
}


def table(second_person: bool) -> Table:
    """What each method needs, on a server that wants a second person for activations or does not."""
    needs = {f"/{service}/{method}": need for service, methods in _NEEDS.items() for method, need in methods.items()}
    return {**needs, **_SECOND_PERSON} if second_person else needs


def need(needs: Table, method: str) -> Need:
    """What a caller of this method needs.

    Raises:
        PermissionDenied: nobody may: the method has no entry.
    """
    if method not in needs:
        raise PermissionDenied("no role opens this method", "")
    return needs[method]


def check(caller: Caller, needed: Need, what: str) -> None:
    """Refuses a caller without the role.

    Raises:
        PermissionDenied: names the role.
    """
    if isinstance(needed, Role) and not caller.may(needed):
        raise PermissionDenied(f"{what} needs the role {needed.value}, which {caller.name} has not", needed.value)
