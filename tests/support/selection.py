"""Pytest plugin that selects tests: by default all but the nightly ones, all with `--nightly`, few with `--quick`.

A nightly test repeats a default test with another model, size or pair of layouts. `--quick` is for the edit-test loop.
`python -m tests.nightly` runs everything, and continues where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Any

import pytest

# Whole files that start few ranks or none: configuration, plans, refusals, estimates.
QUICK_FILES = (
    *("test_config", "test_config_values", "test_imports", "test_devices", "test_restarts"),
    *("test_model", "test_optimizer", "test_optimizer_refusals", "test_selection"),
    *("test_preflight", "test_pipeline_table", "test_pipeline_split", "test_slurm_options", "test_deepspeed_config"),
    *("test_data_positions", "test_data_files", "test_data_build"),
    *("test_report_metrics", "test_report_folder", "test_report_measure", "test_report_reporter"),
)
# One parity row per axis, one planted bug, and estimates of each form.
QUICK_TESTS = (
    "tests/test_parity.py::test_every_layout_has_a_row",
    *(f"tests/test_parity.py::test_layout_equals_single_process[[]{layout}-llama]" for layout in ("ddp", "fsdp")),
    *(f"tests/test_parity.py::test_layout_equals_single_process[[]{layout}-*]" for layout in ("tensor", "pipeline")),
    "tests/test_parity.py::test_layout_equals_single_process[[]context-*]",
    "tests/test_parity_deepspeed.py::test_layout_equals_single_process[[]zero[23]-llama]",
    "tests/test_mutations.py::test_parity_sees_the_bug[[]local_norm]",
    *(f"tests/test_memory_estimate.py::test_{name}*" for name in ("json_totals", "gate", "sweep", "mistakes")),
)


def rows(cases: Iterable[tuple[Any, ...]], often: Callable[..., bool]) -> list[Any]:
    """Cases of a parametrized test.

    often: predicate; cases for which it is false are nightly.
    """
    return [pytest.param(*case, marks=() if often(*case) else pytest.mark.nightly) for case in cases]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly too")
    parser.addoption("--quick", action="store_true", help="run what the inner loop needs: some minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nightly: proves once more what another test proves; runs with --nightly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not _selected(config, item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _selected(config, item)]


def _selected(config: pytest.Config, item: pytest.Item) -> bool:
    if item.get_closest_marker("nightly") and not config.getoption("--nightly"):
        return False
    return not config.getoption("--quick") or is_quick(item.nodeid)


def is_quick(nodeid: str) -> bool:
    file = nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    return file in QUICK_FILES or any(fnmatch(nodeid, pattern) for pattern in QUICK_TESTS)
