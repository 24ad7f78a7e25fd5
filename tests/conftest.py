"""`pytest --write-docs` writes the tables of docs/ from what this session's tests measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import ROWS, render_table

PARITY_PAGE = Path(__file__).parent.parent / "docs" / "parity.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write docs/parity.md from this session's results")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-docs") and exitstatus == 0 and ROWS:
        PARITY_PAGE.write_text(render_table(ROWS))
