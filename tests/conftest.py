"""`pytest --write-docs` writes docs/parity.md from what this session's tests measured, and what is quoted from it.

Rows that were not measured in this session stay. To be rid of those of tests that are no more, delete the page and run
all tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import ROWS, read_rows, render_table
from tests.write_docs import pages, write

PARITY_PAGE = Path(__file__).parent.parent / "docs" / "parity.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slurm-full", action="store_true", help="run the slow faults of tests/slurm too")
    parser.addoption("--write-docs", action="store_true", help="write docs/parity.md from this session's results")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm_full: a minute or more on a real Slurm; runs with --slurm-full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slurm-full"):
        for item in items:
            if item.get_closest_marker("slurm_full"):
                item.add_marker(pytest.mark.skip(reason="takes a minute or more: pytest --slurm-full"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override: a folder of the module's own, in which what one test has traced is there for the next."""
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-docs") and exitstatus == 0 and ROWS:
        earlier = read_rows(PARITY_PAGE.read_text()) if PARITY_PAGE.exists() else []
        PARITY_PAGE.write_text(render_table([*ROWS, *earlier]))
        for page in pages():
            write(page, quick=True)
