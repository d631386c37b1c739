"""Brings a database to this server's schema with the migrations that ship in this package."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from saeguard_server.guard.policy.store.protocol import SchemaMismatch
from saeguard_server.guard.policy.store.tables import METADATA, SCHEMA_TABLE

_MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(connection: Connection) -> None:
    """Makes or updates the tables, inside the connection's transaction; nothing where they are up to date.

    Raises:
        SchemaMismatch: a newer server made them, one is missing, or another program has tables of these names.
    """
    # It says at every start which database it sees.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    scripts = ScriptDirectory.from_config(_config(connection))
    found = set(MigrationContext.configure(connection, opts={"version_table": SCHEMA_TABLE}).get_current_heads())
    _refuse_unknown(found, {script.revision for script in scripts.walk_revisions()})
    present = METADATA.tables.keys() & set(inspect(connection).get_table_names())
    if present and not found:
        raise SchemaMismatch(f"has the tables {', '.join(sorted(present))} but not {SCHEMA_TABLE}")
    if found != set(scripts.get_heads()):
        command.upgrade(_config(connection), "heads")
    missing = METADATA.tables.keys() - set(inspect(connection).get_table_names())
    if missing:
        raise SchemaMismatch(f"lacks the tables {', '.join(sorted(missing))}")


def _refuse_unknown(found: set[str], known: set[str]) -> None:
    if found - known:
        raise SchemaMismatch(
            f"has the schema {', '.join(sorted(found))}, which a newer server made; this one knows up to {max(known)}"
        )


def _config(connection: Connection) -> Config:
    config = Config(attributes={"connection": connection})
    # Percent signs would be taken for placeholders.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
