"""TLS from PEM files, which are read again when they change: certificates are renewed under a running server."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc

from saeguard_server.settings import BadSettings, ServerSettings
from saeguard_server.watched import Stamp, stamp

LOG = logging.getLogger("saeguard.tls")


class Certificates:
    """The files of one server."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._seen: Stamp = ()

    def credentials(self) -> grpc.ServerCredentials:
        """Server credentials that follow the files.

        Raises:
            BadSettings: a file cannot be read.
        """
        try:
            self._seen = stamp(self._files())
            first = self._read()
        except OSError as err:
            raise BadSettings(f"server.tls_*: {err.filename}: {err.strerror}") from err
        return grpc.dynamic_ssl_server_credentials(
            first,
            self._renewed,  # type: ignore[arg-type]  # None is allowed
            require_client_authentication=self._client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called at each handshake: the files where they have changed, None to go on with what there is."""
        try:
            found = stamp(self._files())
            if found == self._seen:
                return None
            fresh = self._read()
        except OSError as err:
            LOG.warning("TLS files cannot be read, the old ones stay", extra={"fields": {"problem": err.strerror}})
            return None
        self._seen = found
        LOG.info("TLS files read again")
        return fresh

    def _files(self) -> list[Path]:
        return [self._certificate, self._key, *([self._client_ca] if self._client_ca is not None else [])]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = (self._key.read_bytes(), self._certificate.read_bytes())
        authorities = self._client_ca.read_bytes() if self._client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)


def credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    """What the settings ask for; None is plain text.

    Raises:
        BadSettings: a file cannot be read.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    client_ca = Path(settings.tls_client_ca) if settings.tls_client_ca is not None else None
    return Certificates(Path(settings.tls_certificate), Path(settings.tls_key), client_ca).credentials()
