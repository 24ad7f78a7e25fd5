"""Checks that need the job's machine, made before anything is built: libraries, kernels, disks.

`plan` has checked the meaning of the overrides. A rank that lacks something raises here, in a line with key, value,
rule and remedy, rather than minutes later inside a library.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.version import Version

from configs.choices import DType, OffloadDevice
from configs.errors import EnvironmentProblem
from configs.packages import installed
from configs.schema import Config
from trainer.engine.deepspeed.setup import (
    LOWEST_VERSION,
    VERSIONS,
    find_ninja,
    import_deepspeed,
    needed_kernels,
    op_builder,
)
from trainer.plan.plan import Plan


def check_deepspeed(config: Config, plan: Plan) -> None:
    """Raises EnvironmentProblem with everything that DeepSpeed's engine needs and this machine lacks. Imports
    DeepSpeed."""
    problems = list(_check_version())
    if not problems:
        problems = [*_check_dtype(plan), *_check_swap_folder(config, plan), *_check_kernels(config, plan)]
    if problems:
        raise EnvironmentProblem(*problems)


def _check_version() -> Iterator[str]:
    remedy = f"pip install 'deepspeed{VERSIONS}'"
    found = installed("deepspeed")
    if found is None:
        yield f"parallel.engine=deepspeed: the package deepspeed is not installed; {remedy}, or use parallel=ddp"
        return
    if Version(found) < Version(LOWEST_VERSION):
        yield (
            f"parallel.engine=deepspeed: deepspeed {found} applies updates that are not finite; {remedy}, or use"
            " parallel=ddp"
        )


def _check_dtype(plan: Plan) -> Iterator[str]:
    import_deepspeed(plan.device)
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    supported = {DType.bfloat16: accelerator.is_bf16_supported, DType.float16: accelerator.is_fp16_supported}
    if plan.param_dtype in supported and not supported[plan.param_dtype]():
        yield (
            f"precision.param_dtype={plan.param_dtype}: DeepSpeed does not support it on this {plan.device}; use"
            " precision=fp32, or parallel=ddp"
        )


def _check_swap_folder(config: Config, plan: Plan) -> Iterator[str]:
    path = config.parallel.offload.nvme_path
    if OffloadDevice.nvme not in (plan.offload_optimizer, plan.offload_parameters) or path is None:
        return
    key, folder = f"parallel.offload.nvme_path={path}", Path(path).expanduser()
    if not folder.exists():
        yield f"{key}: no such folder; create it on a local NVMe disk of every node"
    elif not folder.is_dir():
        yield f"{key}: is not a folder; give a folder on a local NVMe disk"
    else:
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                # The kernel bypasses the page cache, which not every file system supports.
                os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
        except OSError as error:
            yield (
                f"{key}: no file for direct IO can be made there ({error.strerror}); give a writable folder on a local"
                " disk"
            )


def _check_kernels(config: Config, plan: Plan) -> Iterator[str]:
    """A kernel that the installed package does not contain is compiled at first use."""
    from deepspeed.git_version_info import installed_ops

    compiler = os.environ.get("CXX", "c++")
    tools = {
        "a C++ compiler (apt-get install g++)": shutil.which(compiler) is not None,
        "ninja (pip install ninja)": find_ninja(),
        "Python's headers (apt-get install python3-dev)": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    for kernel, wanted_by in needed_kernels(config, plan).items():
        if installed_ops.get(kernel):
            continue
        missing = [tool for tool, found in tools.items() if not found]
        if kernel == "async_io" and not missing and not op_builder(kernel).is_compatible(verbose=False):
            missing.append("libaio's headers (apt-get install libaio-dev)")
        for tool in missing:
            yield f"{wanted_by}: DeepSpeed's {kernel} kernel is compiled at first use, which needs {tool}"
