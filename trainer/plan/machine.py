"""This machine's hardware, found without torch: its GPUs, and the world that a launcher has announced."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.choices import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """gpus: number of visible CUDA devices. cores: CPU cores that this process may use; None if the ranks run
    elsewhere. world_size, local_world_size: from the launcher that started this process; None outside a job."""

    gpus: int = 0
    cores: int | None = None
    world_size: int | None = None
    local_world_size: int | None = None

    def device(self, wanted: Device) -> str:
        if wanted is Device.auto:
            return "cuda" if self.gpus else "cpu"
        return str(wanted)


def find_machine(environment: Mapping[str, str] = os.environ, *, driver: Path = Path("/proc/driver/nvidia")) -> Machine:
    """Look at the launcher's variables and the NVIDIA driver's list of devices.

    Importing torch to count GPUs would cost seconds in every `--help` and every config error.
    """
    world = _integer(environment.get("WORLD_SIZE"))
    # deepspeed's launcher sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE.
    local = _integer(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE"))
    return Machine(
        gpus=_count_gpus(environment, driver),
        cores=len(os.sched_getaffinity(0)),
        world_size=world,
        local_world_size=local,
    )


def _count_gpus(environment: Mapping[str, str], driver: Path) -> int:
    present = len(list((driver / "gpus").glob("*"))) if (driver / "gpus").is_dir() else 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [entry for entry in visible.split(",") if entry.strip() not in ("", "-1")]
    return min(present, len(named))


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None
