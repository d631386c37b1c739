"""Policies in a database through SQLAlchemy, whichever it is; ``sqlite`` and ``postgres`` know what differs.

Writers lock the head row first, so numbers have no gaps and commits have one order. Rows never change once written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Table, and_, func, insert, or_, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from saeguard_server.errors import Conflict, UnknownName
from saeguard_server.guard.policy.changes import between
from saeguard_server.guard.policy.model import Activation, Policy, Revision
from saeguard_server.guard.policy.store import rows, schema, seals
from saeguard_server.guard.policy.store.database import Database
from saeguard_server.guard.policy.store.protocol import (
    Active,
    Change,
    StoreCorrupted,
    StoreUnreachable,
)
from saeguard_server.guard.policy.store.tables import ACTIVATIONS, DOCUMENTS, HEAD, REVISIONS

ANSWER_S = 10.0
"""A database that says nothing for so long counts as gone."""


class _Head(NamedTuple):
    """The newest numbers; 0 before the first."""

    revision: int
    activation: int


class SqlStore:
    """A PolicyStore over one database."""

    is_read_only = False

    def __init__(self, database: Database) -> None:
        self._database = database
        self._parsed: dict[str, Policy] = {}
        self._active: Active | None = None

    @classmethod
    async def open(cls, database: Database) -> SqlStore:
        """Makes the tables where there are none, and starts to listen for changes.

        Raises:
            StoreError: the database cannot be reached, is damaged, or has a schema that is not ours.
        """
        store = cls(database)
        try:
            async with store._transaction(writes=True) as connection:
                await database.prepare(connection)
                await connection.run_sync(schema.migrate)
            await store.active()
            await database.listen()
        except BaseException:
            await database.close()
            raise
        return store

    async def latest(self) -> Revision | None:
        """The newest revision, in force or not; None before the first."""
        async with self._transaction() as connection:
            head = await self._head(connection)
            return await self._revision(connection, head.revision) if head.revision else None

    async def revision(self, number: int) -> Revision:
        """One revision.

        Raises:
            UnknownName: there is none of that number.
        """
        async with self._transaction() as connection:
            return await self._revision(connection, number)

    async def changes(self, *, limit: int, before: int | None = None) -> tuple[Change, ...]:
        """Revisions, newest first: at most ``limit``, with numbers below ``before``."""
        return tuple(rows.change(values) for values in await self._newest(REVISIONS, limit, before))

    async def activations(self, *, limit: int, before: int | None = None) -> tuple[Activation, ...]:
        """Acts, newest first: at most ``limit``, with numbers below ``before``."""
        return tuple(rows.activation(values) for values in await self._newest(ACTIVATIONS, limit, before))

    async def authors_to_approve(self, number: int) -> frozenset[str]:
        """Who wrote what an activation of this revision would put in force for the first time, and its own author."""
        approved = select(func.coalesce(func.max(ACTIVATIONS.c.revision), 0)).where(ACTIVATIONS.c.revision <= number)
        column = REVISIONS.c.number
        is_new = and_(column > approved.scalar_subquery(), column <= number)
        async with self._transaction() as connection:
            found = await connection.execute(select(REVISIONS.c.author).where(or_(is_new, column == number)))
            return frozenset(found.scalars())

    async def active(self) -> Active | None:
        """What is in force; None before the first activation. Two small reads while it stays the same."""
        async with self._transaction() as connection:
            head = await self._head(connection)
            if not head.activation:
                return None
            act = await self._row(connection, ACTIVATIONS, head.activation)
            if self._active is None or self._active.digest != act["seal"]:
                revision = await self._revision(connection, act["revision"])
                self._active = Active(rows.activation(act), revision, act["seal"])
            return self._active

    async def write(self, policies: Sequence[Policy], *, etag: str, author: str, reason: str) -> Revision:
        """Appends a revision that holds exactly these policies, and answers once it is durable.

        Raises:
            Conflict: ``etag`` is not the newest revision's number.
        """
        policies = tuple(sorted(policies, key=lambda policy: policy.name))
        documents = await asyncio.to_thread(rows.documents_of, policies)
        async with self._transaction(writes=True) as connection:
            head = await self._head(connection, locked=True)
            if etag != str(head.revision):
                raise Conflict(f"etag: the newest revision is {head.revision}, not {etag!r}; read it and try again")
            last = await self._row(connection, REVISIONS, head.revision) if head.revision else None
            before = () if last is None else await self._policies(connection, last)
            await self._add_documents(connection, documents)
            changes = rows.changes_text(await asyncio.to_thread(between, before, policies))
            members = rows.members_text(policies, documents)
            values = rows.sealed(
                REVISIONS, last, number=head.revision + 1, author=author, reason=reason, members=members,
                changes=changes,
            )  # fmt: skip
            await self._append(connection, REVISIONS, values, HEAD.c.revision)
        self._database.notice()
        return rows.revision(values, policies)

    async def activate(
        self, revision: int, *, actor: str, reason: str, expected_activation: int | None = None
    ) -> Activation:
        """Puts a revision in force, and answers once that is durable.

        Raises:
            UnknownName: there is none of that number.
            Conflict: the newest activation is not ``expected_activation``.
        """
        async with self._transaction(writes=True) as connection:
            head = await self._head(connection, locked=True)
            if expected_activation not in (None, head.activation):
                raise Conflict(f"activation {head.activation} is in force, not {expected_activation}; look again")
            await self._revision(connection, revision)
            last = await self._row(connection, ACTIVATIONS, head.activation) if head.activation else None
            values = rows.sealed(
                ACTIVATIONS, last, number=head.activation + 1, revision=revision, actor=actor, reason=reason
            )
            await self._append(connection, ACTIVATIONS, values, HEAD.c.activation)
        self._database.notice()
        return rows.activation(values)

    async def verify(self) -> tuple[int, int]:
        """Reads everything; how many revisions and activations there are.

        Raises:
            StoreCorrupted: a row or document is altered or missing, or numbers have a gap.
        """
        async with self._transaction() as connection:
            head = await self._head(connection)
            for table, newest in ((REVISIONS, head.revision), (ACTIVATIONS, head.activation)):
                found = await connection.execute(select(table).order_by(table.c.number))
                seals.check_chain(table, found.all(), newest)
        for number in range(1, head.revision + 1):
            await self.revision(number)
        return head.revision, head.activation

    async def wait(self, timeout_s: float) -> None:
        """Returns when something may have changed since it last returned, at the latest after ``timeout_s``."""
        await self._database.wait(timeout_s)

    async def close(self) -> None:
        """Ends connections."""
        await self._database.close()

    @asynccontextmanager
    async def _transaction(self, *, writes: bool = False) -> AsyncIterator[AsyncConnection]:
        """Everything or nothing; every failure of the database has a name of ours."""
        try:
            async with asyncio.timeout(ANSWER_S), self._database.transaction(writes=writes) as connection:
                yield connection
        except TimeoutError as err:
            raise StoreUnreachable(f"no answer within {ANSWER_S:g} s") from err
        except DBAPIError as err:
            raise self._database.named(err) from err
        except (SQLAlchemyError, OSError) as err:
            raise StoreUnreachable(str(err)) from err

    async def _head(self, connection: AsyncConnection, *, locked: bool = False) -> _Head:
        query = select(HEAD.c.revision, HEAD.c.activation)
        head = (await connection.execute(query.with_for_update() if locked else query)).first()
        if head is None:
            raise StoreCorrupted(f"{HEAD.name} has no row")
        return _Head(*head)

    async def _row(self, connection: AsyncConnection, table: Table, number: int) -> dict[str, Any]:
        """A row that must be there."""
        values = await self._find(connection, table, number)
        if values is None:
            raise StoreCorrupted(f"{table.name} lacks the row {number}")
        return values

    async def _find(self, connection: AsyncConnection, table: Table, number: int) -> dict[str, Any] | None:
        row = (await connection.execute(select(table).where(table.c.number == number))).first()
        return None if row is None else seals.check(table, row)

    async def _newest(self, table: Table, limit: int, before: int | None) -> list[dict[str, Any]]:
        query = select(table).order_by(table.c.number.desc()).limit(limit)
        async with self._transaction() as connection:
            found = await connection.execute(query if before is None else query.where(table.c.number < before))
            return [seals.check(table, row) for row in found]

    async def _revision(self, connection: AsyncConnection, number: int) -> Revision:
        values = await self._find(connection, REVISIONS, number)
        if values is None and not 0 < number <= (await self._head(connection)).revision:
            raise UnknownName("revision", f"there is no revision {number}")
        if values is None:
            raise StoreCorrupted(f"{REVISIONS.name} lacks the row {number}")
        return rows.revision(values, await self._policies(connection, values))

    async def _policies(self, connection: AsyncConnection, values: Mapping[str, Any]) -> tuple[Policy, ...]:
        wanted = rows.members(values["members"])
        # Taken once: whoever reads another revision meanwhile replaces it.
        known = self._parsed
        unknown = sorted(set(wanted.values()) - known.keys())
        found = await connection.execute(select(DOCUMENTS).where(DOCUMENTS.c.digest.in_(unknown))) if unknown else ()
        bodies = {row.digest: row.body for row in found}
        # Only what this revision holds is kept: the next one usually differs by one policy.
        self._parsed = parsed = await asyncio.to_thread(rows.policies, wanted, bodies, known)
        return tuple(parsed.values())

    async def _add_documents(self, connection: AsyncConnection, documents: Mapping[str, str]) -> None:
        known = select(DOCUMENTS.c.digest).where(DOCUMENTS.c.digest.in_(list(documents)))
        new = documents.keys() - set((await connection.execute(known)).scalars())
        if new:
            await connection.execute(insert(DOCUMENTS), [{"digest": one, "body": documents[one]} for one in new])

    async def _append(
        self, connection: AsyncConnection, table: Table, values: Mapping[str, Any], newest: ColumnElement[int]
    ) -> None:
        await connection.execute(insert(table).values(values))
        await connection.execute(update(HEAD).values({newest: values["number"]}))
        await self._database.announce(connection)
