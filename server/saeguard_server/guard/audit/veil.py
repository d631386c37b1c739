"""What becomes of text in records: nothing is kept, or a hash of it, or what only the holder of a key can read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from cryptography.fernet import Fernet

TextMode: TypeAlias = Literal["none", "hash", "encrypt"]


class Veil(Protocol):
    """What a record says of the prompt's and the answer's tokens."""

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]: ...


class Nothing:
    """Records have no text."""

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
        """Nothing."""
        return {}


class Hashed:
    """SHA-256 of the token ids: tells whether a text is the one, to whoever has it. Short texts can be guessed."""

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
        """Both digests, hex."""
        return {"prompt_sha256": digest(prompt), "answer_sha256": digest(answer)}


class Encrypted:
    """The token ids under a Fernet key (AES-128-CBC with HMAC)."""

    def __init__(self, key: bytes) -> None:
        """Raises ValueError for what is not a Fernet key."""
        self._fernet = Fernet(key)

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
        """Both, sealed."""
        return {"prompt_sealed": self._seal(prompt), "answer_sealed": self._seal(answer)}

    def open(self, sealed: str) -> list[int]:
        """The token ids again; raises cryptography.fernet.InvalidToken under another key."""
        return array("I", self._fernet.decrypt(sealed.encode())).tolist()

    def _seal(self, ids: Sequence[int]) -> str:
        return self._fernet.encrypt(array("I", ids).tobytes()).decode()


def veil(mode: TextMode, key_file: str | None) -> Veil:
    """The veil of the settings.

    Raises:
        OSError: the key cannot be read.
        ValueError: it is not a Fernet key.
    """
    if mode == "none":
        return Nothing()
    if mode == "hash":
        return Hashed()
    assert key_file is not None, "settings ask for it"
    return Encrypted(Path(key_file).read_bytes().strip())


def digest(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, four bytes each, hex."""
    return hashlib.sha256(array("I", ids).tobytes()).hexdigest()
