"""Before anything starts: does the plan fit the GPUs that are here? `estimate.gate` says what follows.

What is not estimated, and a GPU that the table does not know, never stop a run: one line says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from configs.choices import Gate
from configs.errors import CookbookError
from configs.schema import Config
from trainer.estimate.estimate import GIB, Estimate, Verdict, estimate
from trainer.estimate.suggest import suggest
from trainer.estimate.tracing import NotEstimated, why_not
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan

EXIT_DOES_NOT_FIT = 3
UNCHECKED = "memory     not estimated, so nothing says whether this fits"


class DoesNotFit(CookbookError):
    """The prediction exceeds the device."""

    exit_code = EXIT_DOES_NOT_FIT


def check_memory(config: Config, plan: Plan, *, driver: Path = Path("/proc/driver/nvidia")) -> list[str]:
    """Lines to print before a start on GPUs. Raises DoesNotFit, with what to change, where the gate refuses."""
    if plan.device != "cuda" or config.estimate.gate is Gate.off:
        return []
    try:
        found = estimate(config, plan, found_gpu=_gpu_name(driver))
    except Exception as error:
        if isinstance(error, CookbookError) and not isinstance(error, NotEstimated):
            raise  # a mistake in the words
        # A defect of the estimator must not end a run that has nothing to do with it.
        return [f"{UNCHECKED}: {why_not(error)}"]
    size, device = found.busiest.device_bytes / GIB, found.device
    known = not device.assumed or config.cluster.gpu_memory_gib is not None
    line = f"memory     {size:.1f} GiB per GPU predicted"
    if device.capacity_bytes is None or not known:
        return [f"{line}; this GPU is not in the table of known ones (cluster.gpu_memory_gib=... compares)"]
    line += f", {device.name} has {device.capacity_bytes / GIB:.1f}: {found.verdict}"
    if found.verdict is not Verdict.does_not_fit:
        return [line]
    lines = [line, *_advice(config, plan, found, driver)]
    if config.estimate.gate is Gate.warn:
        return lines
    raise DoesNotFit(*lines, "estimate.gate=warn starts nevertheless")


def _advice(config: Config, plan: Plan, before: Estimate, driver: Path) -> Iterator[str]:
    pinned = replace(config.cluster, gpus_per_node=plan.gpus_per_node)
    machine = Machine(gpus=plan.gpus_per_node)
    pinned_config, gpu = replace(config, cluster=pinned), _gpu_name(driver)
    for suggestion in suggest(pinned_config, plan, machine, before, found_gpu=gpu):
        size = suggestion.estimate.busiest.device_bytes / GIB
        yield f"  {size:.1f} GiB with {' '.join(suggestion.overrides)}   ({suggestion.why})"


def _gpu_name(driver: Path) -> str | None:
    """The first GPU's name as the NVIDIA driver tells it, without asking CUDA."""
    for file in sorted(driver.glob("gpus/*/information")):
        found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return None
