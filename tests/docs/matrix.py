"""What goes together: every layout with every precision, engine, offload and kind of recompute, asked of the plan.

A cell is what `make_plan` answers for eight GPUs: yes, or the number of the reason it gives. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from configs.choices import Checkpointing, EngineName, OffloadDevice
from configs.errors import PlanError
from configs.load import group_options, load_config
from configs.schema import Config, Offload
from tests.docs.blocks import GPUS
from trainer.make_plan import make_plan

MIXTURE = ("model.config.model_type=qwen3_moe", "model.config.num_experts=8")
Change = Callable[[Config], None]


def matrix() -> str:
    """Tables for precision and engine, offload and recompute, optimizer and tuning; below them the reasons."""
    # One optimizer takes no other schedule.
    loaded = {name: load_config([f"parallel={name}", "scheduler=constant"]) for name in group_options()["parallel"]}
    divided = {name for name, config in loaded.items() if config.parallel.ep != 1}
    loaded |= {name: load_config([f"parallel={name}", "scheduler=constant", *MIXTURE]) for name in divided}
    reasons: dict[str, int] = {}
    groups = (
        _options_of("precision") | _engines(),
        _offloads() | _train_options(),
        _options_of("optimizer") | _options_of("tuning", "tuning "),
    )
    tables = [_table(loaded, columns, reasons) for columns in groups]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n\n".join([*tables, "\n".join(notes)])


def _table(loaded: dict[str, Config], columns: dict[str, Change], reasons: dict[str, int]) -> str:
    """Layouts that are answered alike share a line."""
    alike: dict[str, list[str]] = {}
    for name, config in loaded.items():
        cells = [_cell(config, change, reasons) for change in columns.values()]
        alike.setdefault(" | ".join(cells), []).append(f"`{name}`")
    lines = [f"| layouts | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {', '.join(names)} | {cells} |" for cells, names in alike.items())])


def _cell(config: Config, change: Change, reasons: dict[str, int]) -> str:
    changed = deepcopy(config)
    if changed.parallel.offload.nvme_path is None and changed.parallel.offload.optimizer is OffloadDevice.nvme:
        changed.parallel.offload.nvme_path = "/local_nvme"
    change(changed)
    try:
        make_plan(changed, GPUS)
    except PlanError as error:
        # The first reason says enough; mending it may bring up others.
        return f"no [{reasons.setdefault(error.problems[0], len(reasons) + 1)}]"
    return "yes"


def _options_of(group: str, label: str = "") -> dict[str, Change]:
    """A column for every option of a group of the configuration."""

    def setting(section: Any) -> Change:
        return lambda config: setattr(config, group, section)

    loaded = {name: getattr(load_config([f"{group}={name}"]), group) for name in group_options()[group]}
    return {f"{label}`{name}`": setting(section) for name, section in loaded.items()}


def _engines() -> dict[str, Change]:
    def setting(engine: EngineName) -> Change:
        return lambda config: setattr(config.parallel, "engine", engine)

    return {f"engine `{engine}`": setting(engine) for engine in EngineName}


def _offloads() -> dict[str, Change]:
    nowhere, cpu, nvme = OffloadDevice.none, OffloadDevice.cpu, OffloadDevice.nvme

    def setting(optimizer: OffloadDevice, parameters: OffloadDevice, path: str | None = None) -> Change:
        offload = Offload(optimizer=optimizer, parameters=parameters, nvme_path=path)
        return lambda config: setattr(config.parallel, "offload", offload)

    return {
        "no offload": setting(nowhere, nowhere),
        "optimizer: cpu": setting(cpu, nowhere),
        "both: cpu": setting(cpu, cpu),
        "both: nvme": setting(nvme, nvme, "/local_nvme"),
        "paged states": lambda config: setattr(config.optimizer, "paged", True),
    }


def _train_options() -> dict[str, Change]:
    def recompute(kind: Checkpointing) -> Change:
        return lambda config: setattr(config.train, "activation_checkpointing", kind)

    return {
        "recompute full": recompute(Checkpointing.full),
        "selective": recompute(Checkpointing.selective),
        "compile": lambda config: setattr(config.train, "compile", True),
        "chunked loss": lambda config: setattr(config.train, "chunked_loss", True),
    }
