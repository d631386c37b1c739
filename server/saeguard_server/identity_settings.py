"""Settings of who may call and how much: the ``identity`` table of the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from saeguard_server.address import Address
from saeguard_server.caller import Quota, Role, check_name

Text: TypeAlias = Annotated[str, Meta(min_length=1)]
Algorithm: TypeAlias = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]  # fmt: skip
"""Public-key signatures only: with a shared secret, whoever can check a token can also make one."""


class CertificateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A caller that is known by its client certificate."""

    id: Text
    """Name in the certificate's subject alternative names: a SPIFFE id or another URI, or else a DNS name."""
    name: Text
    """What logs, quotas and policies call it."""
    roles: tuple[Role, ...]
    """What it may do."""
    tags: tuple[Text, ...] = ()
    """What policies can be aimed at."""

    def __post_init__(self) -> None:
        check_name(self.name)


class JwtSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Callers that bring a JSON Web Token of an OpenID Connect issuer."""

    issuer: Text
    """The claim ``iss``, exactly."""
    audience: Text
    """What the claim ``aud`` must be or hold."""
    jwks: Text
    """The issuer's keys: a file, read again when it changes, or an https URL."""
    algorithms: tuple[Algorithm, ...] = ("RS256", "ES256")
    """Signatures that are accepted."""
    name_claim: Text = "sub"
    """Where the caller's name is."""
    name_prefix: str = "jwt:"
    """Put before that name, so that no token can name a caller that is known by key or certificate."""
    roles_claim: Text = "roles"
    """Where its roles are, a list or a string with blanks; dots go into objects, as in "realm_access.roles"."""
    roles_prefix: str = ""
    """Roles begin with this in the claim; what does not, or is no role of ours, gives none."""
    tags_claim: Text | None = None
    """Where its tags are, in the same form; None is nowhere."""
    leeway_s: Annotated[float, Meta(ge=0.0, le=300.0)] = 30.0
    """How far the issuer's clock may be off."""
    jwks_refresh_s: Annotated[float, Meta(ge=1.0, le=86_400.0)] = 300.0
    """Keys from a URL are asked for again after this, so that those which were withdrawn are forgotten."""
    jwks_max_age_s: Annotated[float, Meta(ge=1.0, le=604_800.0)] = 3600.0
    """Keys from a URL that cannot be renewed are trusted no longer than this."""

    def __post_init__(self) -> None:
        if not self.algorithms:
            raise ValueError("algorithms: must not be empty")
        url = urlsplit(self.jwks)
        if url.scheme == "http" and url.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError("jwks: must be a file or an https URL: whoever can change keys on the way can be anybody")
        if self.jwks_max_age_s < self.jwks_refresh_s:
            raise ValueError(f"jwks_max_age_s: must be at least jwks_refresh_s, {self.jwks_refresh_s:g}")

    @property
    def is_remote(self) -> bool:
        """Whether the keys come from a URL."""
        return urlsplit(self.jwks).scheme in ("http", "https")


class IdentitySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How callers are known. With nothing set, everybody is one caller who may do all, and only loopback is served."""

    api_keys: Text | None = None
    """File of API keys, as ``saeguard key create`` writes it; read again when it changes."""
    certificates: tuple[CertificateSettings, ...] = ()
    """Callers known by their certificate; needs server.tls_client_ca."""
    jwt: JwtSettings | None = None
    """Callers known by a token."""
    allow_anonymous: bool = False
    """Serve beyond this machine without asking who calls, as where something in front of the server does. Everybody
    is then the caller "anonymous"."""
    anonymous_roles: tuple[Role, ...] = (Role.GENERATE, Role.OBSERVE, Role.STEER)
    """What that caller may do."""
    quota: Quota = Quota()
    """For every caller that has none of its own."""
    quotas: Mapping[str, Quota] = {}
    """By the caller's name."""

    def __post_init__(self) -> None:
        if self.allow_anonymous and self.asks:
            raise ValueError("allow_anonymous: contradicts api_keys, certificates and jwt, which ask who calls")
        for what in ("id", "name"):
            given = [getattr(one, what) for one in self.certificates]
            for value in given:
                if given.count(value) > 1:
                    raise ValueError(f"certificates: the {what} {value!r} is given twice")

    @property
    def asks(self) -> bool:
        """Whether callers must show who they are."""
        return self.api_keys is not None or bool(self.certificates) or self.jwt is not None

    def quota_of(self, name: str) -> Quota:
        """The quota of the caller of that name."""
        return self.quotas.get(name, self.quota)


def check_reach(identity: IdentitySettings, listen: str, client_ca: str | None) -> None:
    """Refuses to be reached by callers whom nobody asks who they are, and to ask for what they are not made to show.

    Raises:
        ValueError: the message says what to set.
    """
    if identity.certificates and client_ca is None:
        raise ValueError("identity.certificates: needs server.tls_client_ca, which makes callers show a certificate")
    if not (identity.asks or identity.allow_anonymous or Address.parse(listen).is_loopback):
        raise ValueError(
            f"server.listen: {listen} can be reached from elsewhere, and nobody would have to say who calls: set "
            "identity.api_keys (--api-keys), identity.jwt or identity.certificates; or identity.allow_anonymous = true "
            "(--allow-anonymous) where something else lets nobody in who may not"
        )
