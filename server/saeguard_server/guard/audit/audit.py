"""The audit as the rest of the server sees it: one record per request and per act on policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeguard_server.audit_settings import AuditSettings
from saeguard_server.errors import Unavailable
from saeguard_server.guard.audit import record
from saeguard_server.guard.audit.chain import BrokenChain
from saeguard_server.guard.audit.files import AuditFolder
from saeguard_server.guard.audit.veil import Nothing, Veil, veil
from saeguard_server.guard.audit.writer import AuditFailed, AuditWriter
from saeguard_server.observe.metrics import Metrics
from saeguard_server.reply import Completion, PolicyFacts
from saeguard_server.request import Call, GenerationRequest
from saeguard_server.settings import BadSettings

RETRY_S = 1.0


class Audit:
    """Writes records, or nothing where no folder is set.

    A request that must be audited is written down before any work and again before its end is sent: it fails where
    either cannot be written. Of others there is one record, when they are over, and nobody waits for it.
    """

    def __init__(self, writer: AuditWriter | None = None, text: Veil | None = None, *, required: bool = False) -> None:
        self._writer, self._text, self._required = writer, text or Nothing(), required

    @classmethod
    def of(cls, settings: AuditSettings, metrics: Metrics) -> Audit:
        """As the settings say.

        Raises:
            BadSettings: the folder cannot be used, or a key cannot be read.
        """
        if settings.folder is None:
            return cls()
        try:
            key = Path(settings.chain_key_file).read_bytes().strip() if settings.chain_key_file else None
            text = veil(settings.text, settings.text_key_file)
            limit = settings.rotate_mb * 2**20
            folder = AuditFolder(Path(settings.folder), key=key, max_bytes=limit, sync=settings.sync)
        except (OSError, ValueError, BrokenChain) as err:
            raise BadSettings(f"audit: {err}") from err
        return cls(AuditWriter(folder, metrics), text, required=settings.required)

    def request(self, call: Call, request: GenerationRequest, *, is_comparison: bool = False) -> RequestAudit:
        """A request as it came; nothing is written yet."""
        begun = {} if self._writer is None else record.asked_by(call, request, is_comparison=is_comparison)
        return RequestAudit(self._writer, begun, self._text, required=self._required)

    @property
    def is_kept(self) -> bool:
        """Whether records are written anywhere."""
        return self._writer is not None

    async def act(self, call: Call, what: str, **facts: Any) -> None:
        """An act on policies that was done.

        Raises:
            Unavailable: its record cannot be written.
        """
        if self._writer is not None:
            told = {"kind": "policy", "request_id": call.request_id, "caller": call.caller.name, "act": what, **facts}
            await _written(self._writer, told)

    def close(self) -> None:
        """Writes what has come."""
        if self._writer is not None:
            self._writer.close()


class RequestAudit:
    """One request on its way."""

    def __init__(self, writer: AuditWriter | None, begun: dict[str, Any], text: Veil, *, required: bool) -> None:
        self._writer, self._told, self._text, self._required = writer, begun, text, required
        self._is_over = False

    async def admit(self, facts: PolicyFacts | None, seed: int, *, required: bool) -> None:
        """Before any work on it, once it is known which policies decide.

        Args:
            required: whether one of them says that it must be audited.

        Raises:
            Unavailable: it must be, and its record cannot be written.
        """
        if self._writer is None:
            if required:
                raise Unavailable("a policy requires an audit, and this server keeps none", RETRY_S)
            return
        self._required |= required
        self._told = record.admitted(self._told, facts, seed)
        if self._required:
            await _written(self._writer, {"kind": "admitted", **self._told})

    async def finish(self, done: Completion, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Before the end of its answer is sent.

        Raises:
            Unavailable: it must be audited, and that cannot be written.
        """
        if self._writer is None:
            return
        self._is_over = True
        told = {"kind": "request", **record.finished(self._told, done), **self._text.of(prompt, answer)}
        if self._required:
            await _written(self._writer, told)
        else:
            self._writer.note(told)

    def fail(self, reason: str) -> None:
        """It was refused, ended in an error, or its caller went away; nothing where it has finished."""
        if self._writer is not None and not self._is_over:
            self._is_over = True
            self._writer.note({"kind": "request", **self._told, "outcome": reason})


async def _written(writer: AuditWriter, told: dict[str, Any]) -> None:
    try:
        await writer.write(told)
    except AuditFailed as err:
        raise Unavailable(str(err), RETRY_S) from err
