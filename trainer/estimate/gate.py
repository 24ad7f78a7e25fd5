"""Before anything starts: does the plan fit the GPUs that are here? `estimate.gate` says what follows.

A tight plan starts with a warning, unless the gate is strict: its lower end fits, so the run may well fit.
A plan without an estimate, and a GPU that the table does not know, never stop a run: one line says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs import waiting
from configs.choices import Gate
from configs.errors import CookbookError
from configs.schema import Config
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan

# The estimator is imported at its use: it would take half of the time of `launch --help`.
if TYPE_CHECKING:
    from trainer.estimate.estimate import Estimate

EXIT_DOES_NOT_FIT = 3
UNCHECKED = "memory     not estimated, so nothing says whether this fits"


class DoesNotFit(CookbookError):
    """The prediction exceeds the device: its lower end, or under estimate.gate=strict its upper one."""

    exit_code = EXIT_DOES_NOT_FIT


def check_memory(config: Config, plan: Plan, *, driver: Path = Path("/proc/driver/nvidia")) -> list[str]:
    """Lines to print before a start on GPUs. Raises DoesNotFit, with what to change, where the gate refuses."""
    if plan.device != "cuda" or config.estimate.gate is Gate.off:
        return []
    from trainer.estimate.estimate import estimate
    from trainer.estimate.tracing import NotEstimated, why_not
    from trainer.estimate.verdict import Verdict

    try:
        with waiting.on("predicting the memory"):
            found = estimate(config, plan, found_gpu=_gpu_name(driver))
    except Exception as error:
        if isinstance(error, CookbookError) and not isinstance(error, NotEstimated):
            raise  # a mistake in the overrides
        # A defect of the estimator must not end a run that does not depend on it.
        return [f"{UNCHECKED}: {why_not(error)}"]
    device = found.device
    known = not device.assumed or config.cluster.gpu_memory_gib is not None
    if device.capacity_bytes is None or not known:
        return [
            f"{_predicted(found)}; this GPU is not in the table of known ones (cluster.gpu_memory_gib=... compares)"
        ]
    line = judged(found, device.capacity_bytes)
    if found.fits:
        return [line]
    strict = config.estimate.gate is Gate.strict
    if found.verdict is Verdict.tight and not strict:
        return [f"{line}; what the allocator keeps aside may be too much (estimate.gate=strict refuses such a start)"]
    lines = [line, *_advice(config, plan, found, driver)]
    if config.estimate.gate is Gate.warn:
        return lines
    nevertheless = "estimate.gate=refuse starts what is tight" if found.verdict is Verdict.tight else ""
    raise DoesNotFit(*lines, nevertheless or "estimate.gate=warn starts nevertheless")


def judged(found: Estimate, capacity: int | None) -> str:
    """One line that gives an estimate."""
    from trainer.estimate.estimate import GIB

    if capacity is None:
        return f"{_predicted(found)}; name the GPUs to compare with: cluster=8xh100"
    return f"{_predicted(found)}, {found.device.name} has {capacity / GIB:.1f}: {found.verdict}"


def _predicted(found: Estimate) -> str:
    from trainer.estimate.render import gib_range

    return f"memory     {gib_range(found.busiest, digits=1)} GiB per GPU predicted"


def _advice(config: Config, plan: Plan, before: Estimate, driver: Path) -> Iterator[str]:
    from trainer.estimate.render import gib_range
    from trainer.estimate.suggest import suggest

    pinned = replace(config.cluster, gpus_per_node=plan.gpus_per_node)
    machine = Machine(gpus=plan.gpus_per_node)
    pinned_config, gpu = replace(config, cluster=pinned), _gpu_name(driver)
    for suggestion in suggest(pinned_config, plan, machine, before, found_gpu=gpu):
        size = gib_range(suggestion.estimate.busiest, digits=1)
        yield f"  {size} GiB with {' '.join(suggestion.overrides)}   ({suggestion.why})"


def _gpu_name(driver: Path) -> str | None:
    """The first GPU's name from the NVIDIA driver, without asking CUDA."""
    for file in sorted(driver.glob("gpus/*/information")):
        found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return None
