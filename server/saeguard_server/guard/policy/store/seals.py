"""A digest in each row over the row and the seal of the one before: damage and gaps are seen wherever they are read.

Not a secret key: whoever may rewrite the whole database can seal it again. The audit log is what shows that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Table

from saeguard_server.guard.policy.store.protocol import StoreCorrupted


def digest(text: str) -> str:
    """SHA-256, hex, of its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def seal(table: Table, values: dict[str, Any]) -> str:
    """The seal of a row of ``table``, whatever order ``values`` is in."""
    fields = [values[column.name] for column in table.columns if column.name != "seal"]
    return digest(json.dumps([table.name, *fields], ensure_ascii=False))


def check(table: Table, row: Row[Any]) -> dict[str, Any]:
    """The row's values.

    Raises:
        StoreCorrupted: it is not as it was sealed.
    """
    values = dict(row._mapping)
    if seal(table, values) != values["seal"]:
        raise StoreCorrupted(f"row {values['number']} of {table.name} is not what was written")
    return values


def check_chain(table: Table, rows: Sequence[Row[Any]], newest: int) -> None:
    """Of all rows, in order; ``newest`` is the number of the last.

    Raises:
        StoreCorrupted: one is altered, missing or out of place.
    """
    if len(rows) != newest:
        raise StoreCorrupted(f"{table.name} has {len(rows)} rows where its head says {newest}")
    previous = ""
    for number, row in enumerate(rows, start=1):
        values = check(table, row)
        if values["number"] != number or values["previous"] != previous:
            raise StoreCorrupted(f"row {number} of {table.name} is missing or does not follow the one before it")
        previous = values["seal"]
