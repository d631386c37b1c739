"""One call as data: its method, its request's bytes, how its replies are read. The shells send it, nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from saeguard_client._options import PerCall

T = TypeVar("T")
Whole = TypeVar("Whole")
Part = TypeVar("Part")
PartOut = TypeVar("PartOut", covariant=True)


@dataclass(frozen=True, slots=True)
class UnaryCall(Generic[T]):
    """One request, one reply."""

    method: str
    request: bytes
    read: Callable[[bytes], T]
    options: PerCall


class Reader(Protocol[PartOut]):
    """Reads one stream's messages in their order."""

    def read(self, message: bytes) -> PartOut:
        """Raises InternalError where the message breaks the contract."""

    def finish(self) -> None:
        """Raises InternalError where the stream ended too early."""


@dataclass(frozen=True, slots=True)
class StreamCall(Generic[Part]):
    """One request, many replies; every run of it needs a new reader."""

    method: str
    request: bytes
    reader: Callable[[], Reader[Part]]
    options: PerCall


@dataclass(frozen=True, slots=True)
class EitherCall(Generic[Whole, Part]):
    """The same question with one reply or with a stream."""

    whole: UnaryCall[Whole]
    parts: StreamCall[Part]


@dataclass(frozen=True, slots=True)
class GatheredCall(Generic[Whole, Part]):
    """A stream whose parts make one answer."""

    parts: StreamCall[Part]
    gather: Callable[[Iterable[Part]], Whole]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items of a listing and the token of the next page, empty on the last."""

    items: tuple[T, ...]
    next_token: str


class PagedCall(Generic[T]):
    """A listing that comes in pages: what to ask next, what to hand on. Serves one walk."""

    def __init__(self, ask: Callable[[str, int | None], UnaryCall[Page[T]]], limit: int | None) -> None:
        self._ask = ask
        self._left = limit
        self._token: str | None = ""

    def next_call(self) -> UnaryCall[Page[T]] | None:
        """None when there is nothing more to ask."""
        if self._token is None or self._left == 0:
            return None
        return self._ask(self._token, self._left)

    def accept(self, page: Page[T]) -> tuple[T, ...]:
        """The page's items, as many as the caller still wants."""
        items = page.items[: self._left]
        if self._left is not None:
            self._left -= len(items)
        self._token = page.next_token or None
        return items
