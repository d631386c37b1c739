"""Revisions and activations that only grow, without gaps, whoever writes to the database."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

GROWING = ("policy_documents", "policy_revisions", "policy_activations")
NUMBERED = ("policy_revisions", "policy_activations")


def upgrade() -> None:
    """The first schema."""
    op.create_table(
        "policy_documents",
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "policy_revisions",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        *_texts("members", "changes", "author", "time", "reason", "previous", "seal"),
    )
    op.create_table(
        "policy_activations",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("revision", sa.BigInteger, sa.ForeignKey("policy_revisions.number"), nullable=False, index=True),
        *_texts("actor", "time", "reason", "previous", "seal"),
    )
    op.create_table(
        "policy_head",
        sa.Column("id", sa.BigInteger, sa.CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("activation", sa.BigInteger, nullable=False),
    )
    op.execute("INSERT INTO policy_head (id, revision, activation) VALUES (1, 0, 0)")
    protect = {"sqlite": _protect_sqlite, "postgresql": _protect_postgres}
    protect[op.get_context().dialect.name]()


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _protect_sqlite() -> None:
    for table in GROWING:
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
    for table in NUMBERED:
        op.execute(
            f"CREATE TRIGGER {table}_gapless BEFORE INSERT ON {table} "
            f"WHEN NEW.number IS NOT (SELECT coalesce(max(number), 0) + 1 FROM {table}) "
            f"BEGIN SELECT RAISE(ABORT, '{table} has no gaps'); END"
        )
    op.execute(
        "CREATE TRIGGER policy_head_no_delete BEFORE DELETE ON policy_head "
        "BEGIN SELECT RAISE(ABORT, 'policy_head stays'); END"
    )
    op.execute(
        "CREATE TRIGGER policy_head_forward BEFORE UPDATE ON policy_head "
        "WHEN NEW.revision < OLD.revision OR NEW.activation < OLD.activation "
        "BEGIN SELECT RAISE(ABORT, 'policy_head only goes forward'); END"
    )


def _protect_postgres() -> None:
    op.execute(
        "CREATE FUNCTION policy_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ "
        "BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$"
    )
    op.execute(
        "CREATE FUNCTION policy_gapless() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE newest bigint; BEGIN "
        "EXECUTE format('SELECT coalesce(max(number), 0) FROM %I.%I', TG_TABLE_SCHEMA, TG_TABLE_NAME) INTO newest; "
        "IF NEW.number <> newest + 1 THEN "
        "RAISE EXCEPTION '% has no gaps', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END IF; "
        "RETURN NEW; END $$"
    )
    op.execute(
        "CREATE FUNCTION policy_forward() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.revision < OLD.revision OR NEW.activation < OLD.activation THEN "
        "RAISE EXCEPTION 'policy_head only goes forward' USING ERRCODE = 'restrict_violation'; END IF; "
        "RETURN NEW; END $$"
    )
    for table in GROWING:
        _postgres_trigger(f"{table}_growing", f"UPDATE OR DELETE ON {table}", "ROW", "policy_refuse")
    for table in (*GROWING, "policy_head"):
        _postgres_trigger(f"{table}_kept", f"TRUNCATE ON {table}", "STATEMENT", "policy_refuse")
    for table in NUMBERED:
        _postgres_trigger(f"{table}_gapless", f"INSERT ON {table}", "ROW", "policy_gapless")
    _postgres_trigger("policy_head_no_delete", "DELETE ON policy_head", "ROW", "policy_refuse")
    _postgres_trigger("policy_head_forward", "UPDATE ON policy_head", "ROW", "policy_forward")


def _postgres_trigger(name: str, event: str, each: str, function: str) -> None:
    op.execute(f"CREATE TRIGGER {name} BEFORE {event} FOR EACH {each} EXECUTE FUNCTION {function}()")
