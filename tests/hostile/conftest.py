"""What attacks on a running server share: how long a form is asked for, and the table that is printed at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _pytest.terminal import TerminalReporter

ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether the long form is asked for (``--hostile``, as ``make hostile`` does), and not the short one."""
    return bool(request.config.getoption("--hostile"))


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Adds ``attack, bound, outcome`` to the table: what was tried, what was promised, what was measured."""
    rows = request.config.stash.setdefault(ROWS, [])

    def add(attack: str, bound: str, measured: str) -> None:
        rows.append((attack, bound, measured))

    return add


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    table = [("attack", "bound", "outcome"), *sorted(rows)]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    terminalreporter.section("attacks on a running server")
    for row in table:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
