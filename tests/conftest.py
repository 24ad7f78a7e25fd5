"""`pytest --write-docs` writes docs/parity.md from this session's measurements, and updates quotations of the page.

Rows that this session did not measure stay. To remove rows of deleted tests, delete the page and run all tests with
--nightly.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support import kernels

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(kernels.folder()))
pytest_plugins = ["tests.support.selection", "tests.support.shared", "tests.spent"]
if find_spec("xdist"):
    pytest_plugins.append("tests.support.lanes")
PARITY_PAGE = Path(__file__).parent.parent / "docs" / "parity.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write docs/parity.md from this session's results")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(RowsOfLanes(), "rows-of-lanes")
        config.pluginmanager.register(Failures(config), "failures")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an override: a cache folder for each test module, in which its tests share traces."""
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Send the measurements of a lane's test to the session that started the lane."""
    report = yield
    if call.when == "call" and hasattr(item.config, "workerinput"):
        from tests.support.parity import ROWS  # also imports torch, which the lanes' parent session does without

        report.user_properties += [("row", [*row.cells, *row.distance.numbers]) for row in ROWS]
        ROWS.clear()
    return report


class RowsOfLanes:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, cells in report.user_properties:
            if name == "row" and report.when == "call":
                from tests.support.parity import ROWS, Distance, Row

                assert isinstance(cells, list)
                layout, keys, processes, model, precision, *numbers = cells
                ROWS.append(Row(layout, keys, processes, model, precision, Distance(*numbers)))


class Failures:
    """Prints a failed test at once, so that truncated output names it too."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else report.longreprtext
            terminal.write("\n")
            terminal.write_line(f"FAILED {report.nodeid} ({report.when}): {' '.join(why.split())[:400]}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not session.config.getoption("--write-docs") or exitstatus != 0 or hasattr(session.config, "workerinput"):
        return
    from tests.docs.write import pages, write
    from tests.support.parity import ROWS, read_rows, render_table

    if ROWS:
        earlier = read_rows(PARITY_PAGE.read_text()) if PARITY_PAGE.exists() else []
        PARITY_PAGE.write_text(render_table([*ROWS, *earlier]))
        for page in pages():
            write(page, quick=True)
