"""Credentials of every kind, right and wrong ones, made by libraries that are not ours."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from saeguard_server.caller import Role
from saeguard_server.identity.api_keys import KeyFile, change_keys, make_key

CHEAP = 2
"""Of scrypt, for tests."""
ISSUER, AUDIENCE = "https://login.example.org", "saeguard"


def write_keys(path: Path, **roles: Sequence[Role]) -> dict[str, str]:
    """A key for each name with its roles, in the file; returned are the keys."""
    made = {name: make_key(name, tuple(given), (), None, cost=CHEAP) for name, given in roles.items()}
    records = tuple(record for _, record in made.values())
    change_keys(path, lambda old: KeyFile(keys=(*old.keys, *records)))
    return {name: key for name, (key, _) in made.items()}


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows it."""
    return (("authorization", f"Bearer {secret}"),)


@cache
def rsa_key(number: int = 0) -> rsa.RSAPrivateKey:
    """Made once: it takes a tenth of a second."""
    return rsa.generate_private_key(65537, 2048)


@cache
def ec_key(number: int = 0) -> ec.EllipticCurvePrivateKey:
    """Another kind of key."""
    return ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    """The public half."""
    algorithm: Any = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    made: dict[str, Any] = json.loads(algorithm.to_jwk(key.public_key()))
    return made | {"kid": kid, "use": "sig"} | more


def claims(**other: Any) -> dict[str, Any]:
    """Right ones but for what is given; None leaves a claim out."""
    now = int(time.time())
    right = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now + 600, "iat": now, "roles": ["generate"]}
    return {name: value for name, value in (right | other).items() if value is not None}


def token(key: Any = None, kid: str | None = "one", algorithm: str = "RS256", **other: Any) -> str:
    """A token; right unless told otherwise."""
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(**other), key or rsa_key(), algorithm=algorithm, headers=headers)


def forged(algorithm: str, secret: bytes, **other: Any) -> str:
    """What PyJWT refuses to make: no signature, or an HMAC whose secret is a public key."""
    parts = [_part({"alg": algorithm, "typ": "JWT", "kid": "one"}), _part(claims(**other))]
    signed = ".".join(parts)
    mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest() if secret else b""
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@dataclass(frozen=True)
class Certified:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes
    _object: x509.Certificate
    _private: ec.EllipticCurvePrivateKey

    def channel(self, authority: Certified) -> grpc.ChannelCredentials:
        """For a client that shows it."""
        return grpc.ssl_channel_credentials(authority.certificate, self.key, self.certificate)

    def write(self, folder: Path, name: str) -> tuple[str, str]:
        """Paths of certificate and key."""
        paths = folder / f"{name}.pem", folder / f"{name}.key"
        for path, pem in zip(paths, (self.certificate, self.key), strict=True):
            path.write_bytes(pem)
        return str(paths[0]), str(paths[1])


def certified(
    name: str, authority: Certified | None = None, uris: Sequence[str] = (), dns: Sequence[str] = ()
) -> Certified:
    """A certificate from the authority, or one of an authority of its own."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(one) for one in uris]
    names += [x509.DNSName(one) for one in ("localhost", *dns)]
    names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority._object.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority._private if authority else key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certified(built.public_bytes(pem), secret, built, key)
