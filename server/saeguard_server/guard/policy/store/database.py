"""What SQLite and Postgres have in common: connections, transactions, and hearing of changes."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from saeguard_server.guard.policy.store.protocol import StoreError


class Database(ABC):
    """One database, and what is particular about it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def transaction(self, *, writes: bool) -> AsyncIterator[AsyncConnection]:
        """Committed when the block ends, rolled back when it raises."""
        async with self._engine.execution_options(saeguard_writes=writes).begin() as connection:
            yield connection

    @abstractmethod
    async def prepare(self, connection: AsyncConnection) -> None:
        """Before migrations, in their transaction: checks the database, and keeps other servers from migrating it."""

    @abstractmethod
    async def announce(self, connection: AsyncConnection) -> None:
        """Tells other processes, once the transaction is committed."""

    @abstractmethod
    def named(self, error: DBAPIError) -> StoreError:
        """Our name for what the driver raised."""

    async def listen(self) -> None:  # noqa: B027 - not every database can tell.
        """Starts to hear from other processes."""

    def notice(self) -> None:
        """Something may have changed."""
        self._changed.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns on the next notice, or one since it last returned; at the latest after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    async def close(self) -> None:
        """Ends connections."""
        await self._engine.dispose()
