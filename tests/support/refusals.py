"""Configurations for which no plan exists."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from configs.errors import PlanError
from configs.load import load_config
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine


def assert_refused(overrides: Sequence[str], line: str) -> None:
    """Plan two processes and check that exactly one problem begins with `line`."""
    with pytest.raises(PlanError) as caught:
        make_plan(load_config(overrides), Machine(world_size=2, local_world_size=2))
    assert sum(problem.startswith(line) for problem in caught.value.problems) == 1, caught.value
