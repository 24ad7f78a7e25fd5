"""The world that a launcher gives a rank in environment variables, checked before any rank waits for another.

    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT       torchrun, accelerate launch
    the same, with LOCAL_SIZE for LOCAL_WORLD_SIZE                            deepspeed

Also the settings that accelerate's launcher exports from its configuration file, which have no effect here. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from configs.errors import EnvironmentProblem, RankProblem

VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)
LAST_PORT = 65535
PLAN_SHOWN = "COOKBOOK_PLAN_SHOWN"
"""Variable that is set if the program that starts the ranks has printed the plan."""
REMEDY = "torchrun, deepspeed and accelerate launch set it; to train in one process, unset RANK"
# A variable of accelerate's launcher, its neutral values, the setting it requests, and our key for it.
ACCELERATE = (
    ("ACCELERATE_USE_FSDP", ("false",), "FSDP", "parallel=fsdp"),
    ("ACCELERATE_USE_DEEPSPEED", ("false",), "DeepSpeed", "parallel=zero2 or zero3"),
    ("ACCELERATE_USE_MEGATRON_LM", ("false",), "Megatron-LM", "parallel=3d"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("false",), "its parallelism degrees", "parallel.tp, cp and dp_shard"),
    ("ACCELERATE_MIXED_PRECISION", ("no",), "mixed precision {}", "precision={}"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "torch.compile with {}", "train.compile=true"),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ("1", "auto"),
        "{} gradient accumulation steps",
        "train.gradient_accumulation_steps={}",
    ),
    ("ACCELERATE_GRADIENT_CLIPPING", ("none", "auto"), "gradient clipping {}", "train.clip_grad_norm={}"),
)


def for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a launcher that this process starts.

    It omits the caller's own world: ranks that used it would wait for processes that do not exist. Its search path
    omits the working directory, which may hold a folder `configs` or a file `trainer.py`. A user's own module is found
    on PYTHONPATH, or where it is installed.
    """
    ours = {name: value for name, value in environment.items() if name not in VARIABLES}
    ours["PYTHONSAFEPATH"] = "1"
    if (root := source_root()) is not None:
        others = [path for path in ours.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
        ours["PYTHONPATH"] = os.pathsep.join([root, *others])
    return ours


def source_root() -> str | None:
    """The folder of these packages where they are not installed, or from this checkout; else None."""
    root = Path(__file__).parents[2]
    return None if root.name in ("site-packages", "dist-packages") else str(root)


def speaks_for_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints the problems that all ranks of a node share: one of them does."""
    return "RANK" not in environment or environment.get("LOCAL_RANK", "0").strip() == "0"


def check_world(environment: Mapping[str, str] = os.environ) -> None:
    """Raises EnvironmentProblem with one line for each invalid variable; RankProblem if only this rank's are wrong.
    Without RANK there is no launcher, and the other variables are ignored."""
    if "RANK" not in environment:
        return
    own, shared = _numbers(environment)
    shared += _meeting_place(environment)
    if own:
        raise RankProblem(*own, *shared)
    if shared:
        raise EnvironmentProblem(*shared)


def _numbers(environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Problems of this rank's own numbers, and of those that all ranks share."""
    sizes = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", sizes)
    found = {name: _number(environment[name]) for name in names if name in environment}
    bad = [name for name, number in found.items() if number is None]
    lines = {name: f"{name}={environment[name]}: must be a whole number, 0 or more; {REMEDY}" for name in bad}
    if "WORLD_SIZE" not in environment:
        lines["WORLD_SIZE"] = f"WORLD_SIZE: not set, though RANK={environment['RANK']} is; {REMEDY}"
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", sizes), ("LOCAL_RANK", "WORLD_SIZE")):
        number, limit = found.get(name), found.get(size)
        if number is not None and limit is not None and number >= limit and name not in lines:
            lines[name] = f"{name}={number}: must be below {size}={limit}; {REMEDY}"
    local, world = found.get(sizes), found.get("WORLD_SIZE")
    if local is not None and world is not None and local > world:
        lines[sizes] = f"{sizes}={local}: must not be above WORLD_SIZE={world}; {REMEDY}"
    if local is not None and local > 1 and "LOCAL_RANK" not in environment:
        lines["LOCAL_RANK"] = f"LOCAL_RANK: not set, though {sizes}={local} is; {REMEDY}"
    own = [lines.pop(name) for name in ("RANK", "LOCAL_RANK") if name in lines]
    return own, list(lines.values())


def _meeting_place(environment: Mapping[str, str]) -> list[str]:
    """Problems of MASTER_ADDR and MASTER_PORT, which a world of one does not need."""
    needed = (_number(environment.get("WORLD_SIZE", "")) or 0) > 1
    lines = [
        f"{name}: not set, though WORLD_SIZE={environment['WORLD_SIZE']} ranks must meet there; {REMEDY}"
        for name in ("MASTER_ADDR", "MASTER_PORT")
        if needed and not environment.get(name, "").strip()
    ]
    text = environment.get("MASTER_PORT", "").strip()
    if text and not 1 <= (_number(text) or 0) <= LAST_PORT:
        lines.append(f"MASTER_PORT={text}: must be a port, from 1 to {LAST_PORT}")
    return lines


def _number(text: str) -> int | None:
    # int() also accepts digits of other scripts, signs and underscores, which no launcher writes.
    return int(text) if text.strip().isascii() and text.strip().isdigit() and len(text) < 10 else None


def accelerate_note(environment: Mapping[str, str] = os.environ) -> str | None:
    """One line about settings of accelerate's launcher that have no effect here; None if there are none."""
    asked: list[str] = []
    for name, nothing, what, key in ACCELERATE:
        value = environment.get(name, "").strip().lower()
        if value and value not in nothing:
            asked.append(f"{what.format(value)} ({key.format(value)})")
    if not asked:
        return None
    return (
        f"accelerate   its configuration asks for {', '.join(asked)}; that has no effect here: the keys in brackets"
        " decide"
    )
