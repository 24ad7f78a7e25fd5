"""Software versions, device and commit. Package versions are read without importing the packages."""

from __future__ import annotations

import logging
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.packages import installed
from trainer.process.private import without_secrets, write_private

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PACKAGES = (
    "distributed-training-cookbook",
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "flash-attn",
    "peft",
    "bitsandbytes",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pyarrow",
    "rich",
    "wandb",
)
PROJECT = Path(__file__).parents[2]
GIT_TIMEOUT_SECONDS = 30  # a checkout on a slow network disk must not hold up the run
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def versions(device: torch.device) -> dict[str, Any]:
    """Python, platform, packages (null: not installed) and the device with its driver."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "device": _cuda(device) if device.type == "cuda" else {"name": processor(), "type": "cpu"},
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(device)
    driver = re.search(r"Kernel Module.*?\s(\d[\d.]+)", _read(NVIDIA_DRIVER))
    return {
        "name": properties.name,
        "type": "cuda",
        "memory_bytes": properties.total_memory,
        "driver": driver.group(1) if driver else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def processor() -> str:
    model = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return model.group(1) if model else platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def git_state(folder: Path) -> dict[str, dict[str, Any]]:
    """Commit, branch and uncommitted changes of the project and of the working directory; the changes themselves are
    saved as `git-NAME.diff`, without files that seem to hold keys (`left_out`). Empty if neither is a checkout.

    Remotes are omitted: their addresses may hold passwords.
    """
    found: dict[str, dict[str, Any]] = {}
    here = _git(Path.cwd(), "rev-parse", "--show-toplevel")
    # Installed into an environment inside somebody's checkout, the project is not part of that checkout.
    roots = {"project": PROJECT if (PROJECT / ".git").exists() else None, "cwd": Path(here.strip()) if here else None}
    for name, root in roots.items():
        if root is None or str(root) in [state["root"] for state in found.values()]:
            continue
        commit, status, diff = (
            _git(root, *arguments)
            for arguments in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain"),
                ("diff", "HEAD", "--no-ext-diff", "--no-textconv"),
            )
        )
        found[name] = {
            "root": str(root),
            "commit": commit.strip() if commit else None,
            "branch": (_git(root, "branch", "--show-current") or "").strip() or None,
            "dirty": None if status is None else bool(status.strip()),
            "untracked": None
            if status is None
            else [line[3:] for line in status.splitlines() if line.startswith("??")],
        }
        if diff:
            text, left_out = without_secrets(diff)
            write_private(folder / f"git-{name}.diff", text)
            if left_out:
                found[name]["left_out"] = left_out
                log.info("git-%s.diff leaves out what may hold a key: %s", name, ", ".join(left_out))
    return found


def _git(root: Path, *arguments: str) -> str | None:
    """Standard output of a git command; None when git is missing, refuses or takes too long."""
    command = ["git", "--no-optional-locks", "-C", str(root), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
