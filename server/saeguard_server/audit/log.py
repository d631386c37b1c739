"""The audit: one record per request and per act on policies, from which a request can be run again but for its text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import msgspec
from cryptography.fernet import Fernet

from saeguard.requests import GenerateRequest, ModelInput, Sampling
from saeguard.results import Completion, InterventionReceipt, PolicyFacts, TriggerReceipt
from saeguard.types import KINDS, Action, Apply, Condition, FeatureRef, Flag, Intervention, Scope, Stop, Trigger
from saeguard_server.audit.chain import AuditFailed, AuditFolder, AuditWriter, BrokenChain
from saeguard_server.caller import Call
from saeguard_server.errors import RETRY_S, Unavailable
from saeguard_server.observe import Metrics
from saeguard_server.settings import AuditSettings, BadSettings


class Audit:
    """Writes records, or nothing where no folder is set.

    A request that must be audited is written down before any work and again before its end is sent: it fails where
    either cannot be written. Of others there is one record, when they are over, and nobody waits for it.
    """

    def __init__(
        self, writer: AuditWriter | None = None, text: Redaction | None = None, *, required: bool = False
    ) -> None:
        self._writer, self._text, self._required = writer, text, required

    @classmethod
    def of(cls, settings: AuditSettings, metrics: Metrics) -> Audit:
        """As the settings say. Raises BadSettings: the folder cannot be used, or a key cannot be read."""
        if settings.folder is None:
            return cls()
        try:
            key = Path(settings.chain_key_file).read_bytes().strip() if settings.chain_key_file else None
            text = open_redaction(settings.text, settings.text_key_file)
            limit = settings.rotate_mb * 2**20
            folder = AuditFolder(Path(settings.folder), key=key, max_bytes=limit, sync=settings.sync)
        except (OSError, ValueError, BrokenChain) as err:
            raise BadSettings(f"audit: {err}") from err
        return cls(AuditWriter(folder, metrics), text, required=settings.required)

    def request(self, call: Call, request: GenerateRequest, *, is_comparison: bool = False) -> RequestAudit:
        """A request as it came; nothing is written yet."""
        record: dict[str, Any] = {}
        if self._writer is not None:
            record = {"request_id": call.request_id, "caller": call.caller.name, "asked": request_record(request)}
            # A comparison also shows what policies suppress.
            record |= {"is_comparison": True} if is_comparison else {}
            if call.caller.conversation:
                record["asked"]["conversation"] = call.caller.conversation
        return RequestAudit(self._writer, record, self._text, required=self._required)

    @property
    def is_enabled(self) -> bool:
        return self._writer is not None

    async def act(self, call: Call, what: str, **facts: Any) -> None:
        """An act on policies that was done. Raises Unavailable: its record cannot be written."""
        if self._writer is not None:
            record = {"kind": "policy", "request_id": call.request_id, "caller": call.caller.name, "act": what}
            await _write(self._writer, record | facts)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class RequestAudit:
    def __init__(
        self, writer: AuditWriter | None, record: dict[str, Any], text: Redaction | None, *, required: bool
    ) -> None:
        self._writer, self._record, self._text, self._required = writer, record, text, required
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
        self._record |= {"policy": None if facts is None else msgspec.to_builtins(facts), "seed": seed}
        if self._required:
            await _write(self._writer, {"kind": "admitted", **self._record})

    async def finish(self, done: Completion, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Before the end of its answer is sent. Raises Unavailable: it must be audited, and that cannot be written."""
        if self._writer is None:
            return
        self._is_over = True
        text = {} if self._text is None else self._text.of(prompt, answer)
        record = {"kind": "request", **self._record, **outcome_record(done), **text}
        if self._required:
            await _write(self._writer, record)
        else:
            self._writer.note(record)

    def fail(self, reason: str) -> None:
        """It was refused, ended in an error, or its caller went away; nothing where it has finished."""
        if self._writer is not None and not self._is_over:
            self._is_over = True
            self._writer.note({"kind": "request", **self._record, "outcome": reason})


async def _write(writer: AuditWriter, record: dict[str, Any]) -> None:
    try:
        await writer.write(record)
    except AuditFailed as err:
        raise Unavailable(str(err), RETRY_S) from err


# --- records


_ACTIONS: dict[str, Action] = {"flag": Flag(), "stop": Stop()}
_SHARED = {field.name for field in fields(Intervention)}


def request_record(request: GenerateRequest) -> dict[str, Any]:
    """The request without the prompt; ``request_from_record`` reads it back."""
    return {
        "sampling": msgspec.to_builtins(request.sampling),
        "interventions": [_edit_record(edit) for edit in request.interventions],
        "max_relative_edit": request.max_relative_edit,
        "watch": msgspec.to_builtins(request.watch),
        "parse_special_tokens": request.parse_special_tokens,
        "triggers": [_trigger_record(trigger) for trigger in request.triggers],
        "policies": list(request.policies),
        "conversation": request.conversation,
    }


def request_from_record(record: Mapping[str, Any], input: ModelInput) -> GenerateRequest:
    """The same request with the prompt put back. Raises ValueError: that is not what ``request_record`` gave."""
    try:
        return GenerateRequest(
            input=input,
            sampling=msgspec.convert(record["sampling"], Sampling),
            interventions=tuple(map(_edit, record["interventions"])),
            max_relative_edit=record["max_relative_edit"],
            watch=msgspec.convert(record["watch"], tuple[FeatureRef, ...]),
            parse_special_tokens=record.get("parse_special_tokens", False),  # not in older records
            triggers=tuple(map(_trigger, record["triggers"])),
            policies=tuple(record["policies"]),
            conversation=record["conversation"],
        )
    except (KeyError, TypeError) as err:
        raise ValueError(f"not a record of a request: {err}") from err


def outcome_record(done: Completion) -> dict[str, Any]:
    receipt = done.receipt
    return {
        "outcome": done.finish_reason,
        "policy": None if done.policy is None else msgspec.to_builtins(done.policy),
        "stopped_by": None if done.stopped_by is None else msgspec.to_builtins(done.stopped_by),
        "prompt_tokens": done.usage.prompt_tokens,
        "generated_tokens": done.usage.generated_tokens,
        "model": None if receipt is None else receipt.model_digest,
        "steering": None if receipt is None else receipt.steering_digest,
        "edits": [] if receipt is None else [_finite(edit) for edit in receipt.interventions],
        "triggers": [] if receipt is None else [_finite(trigger) for trigger in receipt.triggers],
        "total_s": done.timings.total_s,
    }


def _edit_record(edit: Intervention) -> dict[str, Any]:
    return {
        "sae": edit.sae,
        "feature": edit.feature,
        "kind": edit.kind,
        "edit": {field.name: getattr(edit, field.name) for field in fields(edit) if field.name not in _SHARED},
        "scope": msgspec.to_builtins(edit.scope),
        "when": None if edit.when is None else msgspec.to_builtins(edit.when),
    }


def _edit(record: dict[str, Any]) -> Intervention:
    return KINDS[record["kind"]](
        record["sae"],
        record["feature"],
        **record["edit"],
        scope=msgspec.convert(record["scope"], Scope),
        when=None if record["when"] is None else _condition(record["when"]),
    )


def _condition(record: dict[str, Any]) -> Condition:
    # Older records have a term's feature as {"feature": {"sae": ..., "feature": ...}}.
    terms = [{**term, **term["feature"]} if "sae" not in term else term for term in record["terms"]]
    return msgspec.convert({**record, "terms": terms}, Condition)


def _trigger_record(trigger: Trigger) -> dict[str, Any]:
    action: Any = type(trigger.action).__name__.lower()
    if isinstance(trigger.action, Apply):
        action = [_edit_record(edit) for edit in trigger.action.interventions]
    return {"name": trigger.name, "when": msgspec.to_builtins(trigger.when), "action": action}


def _trigger(record: dict[str, Any]) -> Trigger:
    action = record["action"]
    return Trigger(
        record["name"],
        _condition(record["when"]),
        _ACTIONS[action] if isinstance(action, str) else Apply(tuple(map(_edit, action))),
    )


def _finite(receipt: InterventionReceipt | TriggerReceipt) -> dict[str, Any]:
    """JSON knows no infinity: a maximum over nothing is left out."""
    values: dict[str, Any] = msgspec.to_builtins(receipt)
    return {name: value for name, value in values.items() if value not in (inf, -inf)}


# --- what records hold of prompts and answers


TextMode: TypeAlias = Literal["none", "hash", "encrypt"]


class Redaction(Protocol):
    """What a record says of the prompt's and the answer's tokens."""

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]: ...


class HashedText:
    """SHA-256 of the token ids: tells whether a text is the one, to whoever has it. Short texts can be guessed."""

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
        return {"prompt_sha256": tokens_digest(prompt), "answer_sha256": tokens_digest(answer)}


class EncryptedText:
    """The token ids under a Fernet key (AES-128-CBC with HMAC)."""

    def __init__(self, key: bytes) -> None:
        self._fernet = Fernet(key)

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
        return {"prompt_sealed": self._seal(prompt), "answer_sealed": self._seal(answer)}

    def open(self, sealed: str) -> list[int]:
        """The token ids again; raises cryptography.fernet.InvalidToken under another key."""
        return array("I", self._fernet.decrypt(sealed.encode())).tolist()

    def _seal(self, ids: Sequence[int]) -> str:
        return self._fernet.encrypt(array("I", ids).tobytes()).decode()


def open_redaction(mode: TextMode, key_file: str | None) -> Redaction | None:
    """As the settings say.

    Raises:
        OSError: the key cannot be read.
        ValueError: it is not a Fernet key.
    """
    if mode == "none":
        return None
    if mode == "hash":
        return HashedText()
    assert key_file is not None, "settings ask for it"
    return EncryptedText(Path(key_file).read_bytes().strip())


def tokens_digest(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, four bytes each, hex."""
    return hashlib.sha256(array("I", ids).tobytes()).hexdigest()
