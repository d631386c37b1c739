"""The tables as queries see them; ``migrations`` makes them, with the triggers that keep them append-only."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, MetaData, Table, Text

METADATA = MetaData()
SCHEMA_TABLE = "policy_schema"
"""Where Alembic notes which migrations were made."""

DOCUMENTS = Table(
    "policy_documents", METADATA,
    Column("digest", Text, primary_key=True),  # SHA-256 of body, hex
    Column("body", Text, nullable=False),  # one policy, canonical JSON
)  # fmt: skip

REVISIONS = Table(
    "policy_revisions", METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("members", Text, nullable=False),  # JSON: [[name of the policy, digest of its document], ...]
    Column("changes", Text, nullable=False),  # JSON: [[name of the policy, kind, diff], ...]
    Column("author", Text, nullable=False),
    Column("time", Text, nullable=False),  # ISO 8601, UTC
    Column("reason", Text, nullable=False),
    Column("previous", Text, nullable=False),  # the seal of the row before; empty for the first
    Column("seal", Text, nullable=False),
)  # fmt: skip

ACTIVATIONS = Table(
    "policy_activations", METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("time", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("previous", Text, nullable=False),
    Column("seal", Text, nullable=False),
)  # fmt: skip

HEAD = Table(
    "policy_head", METADATA,
    Column("id", BigInteger, primary_key=True),
    Column("revision", BigInteger, nullable=False),  # the newest numbers: one row, which writers lock
    Column("activation", BigInteger, nullable=False),
)  # fmt: skip
