"""A cache of DeepSpeed's compiled kernels, shared by all checkouts and environments with the same versions.

torch recompiles them for every environment because the path of the headers is part of the command. This takes eight
minutes of CPU time. The cache is keyed by the dependencies, and a complete kernel is loaded as it is.
"""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMPLETE = "complete"


def folder() -> Path:
    """The cache folder for these versions and this CPU; the kernels are compiled for its instruction set."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    names = [f"{name}-{version(name)}" for name in ("torch", "deepspeed")]
    names += [f"python-{platform.python_version()}", hashlib.sha256(flags.encode()).hexdigest()[:8]]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "distributed-training-cookbook" / "kernels" / "_".join(names)


def load_complete_ones() -> None:
    """Make this process, and all forks of it, load complete kernels without running ninja."""
    from deepspeed.ops.op_builder.builder import OpBuilder
    from torch.utils import cpp_extension

    compile_and_load = OpBuilder.jit_load

    def jit_load(self: Any, verbose: bool = True) -> Any:
        built = Path(os.environ["TORCH_EXTENSIONS_DIR"], self.name)
        if not (built / COMPLETE).exists():
            return compile_and_load(self, verbose)
        module = cpp_extension._import_module_from_library(self.name, str(built), True)
        OpBuilder._loaded_ops[self.name] = module
        return module

    if "TORCH_EXTENSIONS_DIR" in os.environ:
        OpBuilder.jit_load = jit_load


def mark_complete() -> None:
    """Mark the kernels compiled so far as complete. No other process may be compiling there."""
    for built in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/*.so"):
        if built.stem == built.parent.name:
            (built.parent / COMPLETE).touch()


def remove_stale_locks() -> None:
    """Remove the locks of compilations that were killed. torch would wait for them without end. No other process may
    be compiling there."""
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink()
