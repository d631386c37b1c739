"""Who calls: certificate, then API key, then token; exactly one of them per call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TypeAlias

from saeguard_server.caller import Caller, Role
from saeguard_server.errors import PermissionDenied, Unauthenticated
from saeguard_server.identity.api_keys import ApiKeys, Authenticator, Certificates, Presented
from saeguard_server.identity.oidc import Tokens, open_jwks
from saeguard_server.settings import CertificateSettings, IdentitySettings

LOG = logging.getLogger("saeguard.identity")


class Identity:
    """Asks each authenticator. Without any, everybody is ``everybody``."""

    def __init__(self, authenticators: Sequence[Authenticator], everybody: Caller | None) -> None:
        assert (everybody is None) == bool(authenticators), "either callers are asked, or they are all one"
        self._authenticators = tuple(authenticators)
        self._everybody = everybody

    @classmethod
    def of(cls, settings: IdentitySettings) -> Identity:
        """As the settings say.

        Raises:
            BadSettings: a file of keys cannot be used.
        """
        found: list[Authenticator] = []
        if settings.certificates:
            found.append(Certificates({one.id: _certified(one, settings) for one in settings.certificates}))
        if settings.api_keys is not None:
            found.append(ApiKeys(Path(settings.api_keys), settings.quota_of))
        if settings.jwt is not None:
            found.append(Tokens(settings.jwt, open_jwks(settings.jwt), settings.quota_of))
        if not found:
            everybody = _everybody(settings)
            level = logging.WARNING if settings.allow_anonymous else logging.INFO
            fields = {"caller": everybody.name, "roles": sorted(everybody.roles)}
            LOG.log(level, "nobody is asked who calls", extra={"fields": fields})
            return cls(found, everybody)
        return cls(found, None)

    async def caller(self, presented: Presented) -> Caller:
        """Who this is.

        Raises:
            Unauthenticated: nothing was shown, more than one thing, or one that is not valid.
            Unavailable, Overloaded: that cannot be found out now.
        """
        if self._everybody is not None:
            return self._everybody
        found = [one for one in self._authenticators if one.recognises(presented)]
        has_certificate = any(isinstance(one, Certificates) for one in found)
        if has_certificate + len(presented.authorization) > 1:
            raise Unauthenticated("more than one credential was shown: send one certificate, key or token")
        if not found:
            wanted = ", or ".join(one.wants for one in self._authenticators)
            raise Unauthenticated(f"who calls? This server wants {wanted}")
        return await found[0].caller(presented)


def _certified(one: CertificateSettings, settings: IdentitySettings) -> Caller:
    return Caller(one.name, frozenset(one.roles), frozenset(one.tags), settings.quota_of(one.name))


def _everybody(settings: IdentitySettings) -> Caller:
    if settings.allow_anonymous:
        return Caller("anonymous", frozenset(settings.anonymous_roles), quota=settings.quota_of("anonymous"))
    return Caller.local(settings.quota_of("local"))


# The one table of what each RPC needs, and the checks against it.


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


def role_table(second_person: bool) -> Table:
    """What each method needs, on a server that wants a second person for activations or does not."""
    needs = {f"/{service}/{method}": need for service, methods in _NEEDS.items() for method, need in methods.items()}
    return {**needs, **_SECOND_PERSON} if second_person else needs


def needed_role(needs: Table, method: str) -> Need:
    """What a caller of this method needs.

    Raises:
        PermissionDenied: nobody may: the method has no entry.
    """
    if method not in needs:
        raise PermissionDenied("no role opens this method", "")
    return needs[method]


def check_role(caller: Caller, needed: Need, what: str) -> None:
    """Refuses a caller without the role.

    Raises:
        PermissionDenied: names the role.
    """
    if isinstance(needed, Role) and not caller.may(needed):
        raise PermissionDenied(f"{what} needs the role {needed.value}, which {caller.name} has not", needed.value)
