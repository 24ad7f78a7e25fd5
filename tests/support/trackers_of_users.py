"""A user-defined tracker for tests of `logging.target`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Lines:
    def __init__(self, file: str, folder: Path, run_name: str, config: dict[str, Any]) -> None:
        self.path = folder / file
        self.path.write_text(f"begin {run_name} {config['train']['steps']}\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        with self.path.open("a") as file:
            file.write(f"{step} {' '.join(values)}\n")

    def finish(self, *, failed: bool) -> None:
        with self.path.open("a") as file:
            file.write(f"end {failed}\n")
