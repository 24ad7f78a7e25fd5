"""The files in RUN_DIR/ray: the state of the run on Ray, and whether its supervising program is alive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from slurm.supervise import is_locked
from trainer.process.files import read_json, replace_text
from trainer.process.status import LOCK

FOLDER, STATE = "ray", "status.json"


def folder(run_dir: Path) -> Path:
    return run_dir / FOLDER


def write_state(run_dir: Path, state: str, **more: object) -> None:
    """state: waiting, running, finished, stopped or failed."""
    content = {"state": state, **more, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    replace_text(folder(run_dir) / STATE, json.dumps(content, indent=1) + "\n")


def read_state(run_dir: Path) -> Mapping[str, object]:
    return read_json(folder(run_dir) / STATE)


def is_driven(run_dir: Path) -> bool:
    """Whether a `python -m launch` supervises this run. Not for that process itself, which would lose its lock."""
    return is_locked(folder(run_dir) / LOCK)
