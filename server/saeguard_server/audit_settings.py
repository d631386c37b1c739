"""Settings of the audit: where records go, and what they hold."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# The check stands above the class: its defaults are built, and checked, at import.


def _check(settings: AuditSettings) -> None:
    if (settings.text == "encrypt") != (settings.text_key_file is not None):
        raise ValueError('text_key_file: goes together with text = "encrypt"')
    if settings.folder is None and (settings.required or settings.text != "none"):
        raise ValueError("folder: must be set, or nothing is audited")


class AuditSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One record for each request and each act on policies."""

    folder: Annotated[str, Meta(min_length=1)] | None = None
    """Where the files are; one server writes to a folder. Without one, nothing is audited."""
    required: bool = False
    """Whether every request fails that cannot be audited; otherwise those under policies that say so."""
    text: Literal["none", "hash", "encrypt"] = "none"
    """What records hold of prompts and answers: nothing; SHA-256 of their token ids; the ids under a key."""
    text_key_file: str | None = None
    """A Fernet key, as `saeguard audit key` makes it."""
    chain_key_file: str | None = None
    """A secret under which the chain is made; without it, who can write the files can also make up a whole chain."""
    rotate_mb: Annotated[int, Meta(ge=1, le=1_048_576)] = 64
    """Size of a file, in MiB, at which another is begun."""
    sync: bool = True
    """Whether a record is on the disk, not only with the operating system, before anybody is told that it is."""

    def __post_init__(self) -> None:
        _check(self)
