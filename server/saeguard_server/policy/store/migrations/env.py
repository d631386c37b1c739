"""Alembic runs this file; ``schema`` hands it the connection, inside whose transaction everything happens."""

from __future__ import annotations

from alembic import context

from saeguard_server.policy.store.sql import SCHEMA_TABLE

context.configure(
    connection=context.config.attributes["connection"], version_table=SCHEMA_TABLE, transactional_ddl=True
)
context.run_migrations()
