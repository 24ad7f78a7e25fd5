"""Each layout, planned and checked on this machine as a run would be, with what it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from configs.choices import EngineName
from configs.errors import CookbookError
from configs.load import chosen_options, group_options, load_config
from launch.doctor.fact import Fact
from trainer.engine.deepspeed.preflight import check_deepspeed
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine

GROUP = "parallel"


def layouts(overrides: Sequence[str], config_dir: str | None, *, named: bool) -> Iterator[Fact]:
    """named: the overrides choose a layout, and only that one is checked. Else every option of the group."""
    chosen = chosen_options(overrides, config_dir=config_dir)[GROUP] or "own settings"
    options = [chosen] if named else list(group_options(config_dir)[GROUP])
    for option in options:
        own = list(overrides) if named else [*overrides, f"{GROUP}={option}"]
        yield from _layout(option, own, config_dir)


def _layout(option: str, overrides: Sequence[str], config_dir: str | None) -> Iterator[Fact]:
    try:
        config = load_config(overrides, config_dir=config_dir)
        plan = make_plan(config, replace(find_machine(), world_size=None, local_world_size=None))
        if plan.engine is EngineName.deepspeed:
            check_deepspeed(config, plan)
    except CookbookError as error:
        for problem in error.problems:
            yield Fact(option, problem, well=False)
        return
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one process"
    yield Fact(option, f"can run: {plan.world_size} process(es) on {plan.device}, {axes}")
