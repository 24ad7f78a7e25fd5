"""Pytest plugin: `-n 4` (pytest-xdist) keeps two cores busy, and tests do not disturb each other.

The first lane begins with tests that mostly wait: Slurm jobs, kills, restarts, hung ranks. The other lanes compute
meanwhile. An idle lane takes work from the other queue.

A lane runs one unit at a time. A unit is a file, whose tests share fixtures and caches. Files in DIVIDED are long, so
each of their tests is a unit, and these tests share results on disk (`tests.support.shared`). Long units come first, so
all lanes end at about the same time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

SLURM = "tests/slurm/"  # all of them share one cluster
WAITING = (
    SLURM,
    "tests/test_launch_restarts.py",
    "tests/test_lifetimes.py",
    "tests/test_watchdog.py",
    "tests/test_nodes.py",
    "tests/test_launch_process.py",
    "tests/test_slurm_supervise.py",
    "tests/test_checkpoint_run.py",
    "tests/test_exhausted.py",
)
LONG = (
    "tests/test_checkpoint_layouts.py",
    "tests/test_checkpoint_more.py",
    "tests/test_planner.py",
    "tests/test_memory_estimate.py",
    "tests/test_comparison.py",
    "tests/test_pipeline_parallel.py",
    "tests/test_tensor_parallel.py",
    "tests/test_deepspeed_steps.py",
)
DIVIDED = (
    "tests/test_docs.py",
    "tests/test_parity_deepspeed.py",
    "tests/test_parity.py",
    "tests/test_tuning.py",
    "tests/test_quantized.py",
    "tests/test_memory_measured.py",
)


def unit_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return SLURM if file.startswith(SLURM) else nodeid if file in DIVIDED else file


def in_order(nodeids: list[str]) -> list[str]:
    """Sort tests by start: waiting files, long files, the other files by number of tests, divided files."""
    tests = Counter(map(unit_of, nodeids))

    def place(nodeid: str) -> tuple[int, int]:
        unit = unit_of(nodeid)
        file = unit.partition("::")[0]
        for number, files in ((0, WAITING), (1, LONG), (3, DIVIDED)):
            if file in files:
                return number, files.index(file)
        return 2, -tests[unit]

    return sorted(nodeids, key=place)


class Lanes(LoadScopeScheduling):
    """Hands out units in the order of the collection. The first lane gets the waiting units while there are any."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        first = node.gateway.id == "gw0"
        unit = next((unit for unit in self.workqueue if (unit in WAITING) is first), None)
        if unit is not None:
            self.workqueue.move_to_end(unit, last=False)
        super()._assign_work_unit(node)


class Planned:
    """Pytest hooks of a session with several lanes."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        places = {nodeid: number for number, nodeid in enumerate(in_order([item.nodeid for item in items]))}
        items.sort(key=lambda item: places[item.nodeid])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Lanes:
        # By default the base class sorts the units by their number of tests.
        config.option.loadscopereorder = False
        return Lanes(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        config.pluginmanager.register(Planned(), "planned")
