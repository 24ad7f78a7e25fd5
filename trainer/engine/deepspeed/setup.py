"""DeepSpeed's surroundings: its import, its compiled kernels, a model that is partitioned while it is filled, and a way
to drop a gradient.

A test and `LOWEST_VERSION` pin everything here that uses DeepSpeed's undocumented interfaces.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.distributed import distributed_c10d
from torch.utils import cpp_extension

from configs.choices import Implementation, OffloadDevice
from configs.errors import EnvironmentProblem, first_line
from configs.schema import Config
from trainer.plan.plan import Plan

log = logging.getLogger(__name__)

# From this version on every stage skips an update whose gradient is not finite, whatever the dtype, and ZeRO 2 adds up
# 16-bit gradients in float32.
VERSIONS = ">=0.19.8,<0.20"  # as in pyproject.toml
LOWEST_VERSION = VERSIONS.removeprefix(">=").partition(",")[0]


def import_deepspeed(device: str) -> ModuleType:
    """DeepSpeed, set to the plan's kind of device ("cpu" or "cuda") and quiet. Takes seconds."""
    # Read once, at import. Without it a CPU run on a GPU machine would train on the GPU.
    os.environ["DS_ACCELERATOR"] = device
    # Collectives that newer torch versions have renamed; the reader of a log can do nothing about it.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=rf".*{name}.* is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    if device == "cpu":
        # Joining the process group would compile a shared-memory all-reduce for half a minute, which training never
        # calls, and fail without a compiler. Only this table decides about it.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
    _forget_earlier_run()
    its_log = logging.getLogger("DeepSpeed")
    its_log.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    its_log.addFilter(_is_news)
    return deepspeed


def _forget_earlier_run() -> None:
    """DeepSpeed keeps its process groups in module variables: those of an earlier run in this process ended with that
    run's world."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    its_comm: Any = comm
    world = its_comm.cdb and groups._WORLD_GROUP
    if world is None or world in distributed_c10d._world.pg_map:
        return
    its_comm.cdb = None
    for name, value in list(vars(groups).items()):
        if name.endswith(("_GROUP", "_GROUP_RANKS")) or name in ("mpu", "mesh_device"):
            setattr(groups, name, {} if isinstance(value, dict) else None)


def _is_news(record: logging.LogRecord) -> bool:
    """The loop reports skipped updates, with the step and the remedy."""
    return "OVERFLOW" not in record.getMessage()


def needed_kernels(config: Config, plan: Plan) -> dict[str, str]:
    """Compiled parts of DeepSpeed that the run calls: {name of the op: the key=value that needs it}."""
    kernels = {}
    for key, device in (("optimizer", plan.offload_optimizer), ("parameters", plan.offload_parameters)):
        if device is OffloadDevice.nvme:
            kernels["async_io"] = f"parallel.offload.{key}=nvme"
    if config.optimizer.implementation is Implementation.deepspeed_cpu:
        kernels["cpu_adam"] = "optimizer.implementation=deepspeed_cpu"
    return kernels


def load_kernels(kernels: dict[str, str], *, local_rank: int) -> None:
    """Load the ops, compiling them at first use (minutes; one rank per node compiles, the others wait).

    kernels: from `needed_kernels`. Raises EnvironmentProblem if the compiler fails.
    """
    find_ninja()
    for name, wanted_by in kernels.items():
        if local_rank == 0:
            _announce(name)
        try:
            op_builder(name).load(verbose=False)
        except Exception as error:  # compiler, linker, loader, missing CUDA: each has its own error
            raise EnvironmentProblem(
                f"{wanted_by}: DeepSpeed's {name} kernel did not compile: {first_line(error)}"
            ) from None


def op_builder(name: str) -> Any:
    """DeepSpeed's builder of an op that `needed_kernels` names: `is_compatible()`, `load()`."""
    from deepspeed.accelerator import get_accelerator

    classes = {"async_io": "AsyncIOBuilder", "cpu_adam": "CPUAdamBuilder"}
    accelerator: Any = get_accelerator()
    return accelerator.create_op_builder(classes[name])


def find_ninja() -> bool:
    """Whether ninja, which compiles the kernels, can be started. Looks next to the interpreter too: an environment that
    is used without being activated is not on the PATH."""
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).parent
        if (beside / "ninja").exists():
            os.environ["PATH"] = os.pathsep.join((str(beside), os.environ.get("PATH", "")))
    return shutil.which("ninja") is not None


def _announce(name: str) -> None:
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    if (folder / "lock").exists():
        # A killed build leaves its lock, and every later run would wait for ever without a message.
        log.warning("%s/lock: another process is compiling; if none is, delete this file", folder)
    elif not (folder / f"{name}.so").exists():
        log.warning("compiling DeepSpeed's %s kernel into %s: minutes, once per machine", name, folder)


class Partitioner:
    """Called with each filled unit of the model: keeps this rank's W-th part of its parameters, if the plan partitions
    them. No rank ever holds more than one unit whole."""

    def __init__(self, deepspeed: ModuleType, settings: dict[str, Any]) -> None:
        self.deepspeed, self.settings = deepspeed, settings
        self.swapper = self.sharing = None

    def __call__(self, unit: nn.Module) -> None:
        init = self.deepspeed.zero.Init(
            module=unit,
            # The dtype comes from here. Given as an argument, it is ignored on devices without float16.
            config_dict_or_path=self.settings,
            # One swapper for the whole model; otherwise each makes its own buffers.
            param_swapper=self.swapper,
            # Likewise the ranks of a second copy (hpZ): it makes their group once.
            zero_param_parallel_group=self.sharing,
        )
        self.swapper, self.sharing = init.param_swapper, init.zero_param_process_group


def messages_sent() -> Iterator[str]:
    """DeepSpeed's message counts since they were enabled, as lines; resets them."""
    from deepspeed.comm.comm import comms_logger

    its_log: Any = comms_logger
    for kind, sizes in its_log.get_raw_data().items():
        for size, (count, milliseconds, *_) in sorted(sizes.items()):
            yield f"{kind} of {size} bytes: {count} times, {sum(milliseconds) / count:.2f} ms each"
    its_log.reset_data()
    its_log.enabled = False


def drop_gradient(optimizer: Any) -> None:
    """Drop the accumulated gradient, as DeepSpeed does when it skips an update, but without notifying the loss scale.
    optimizer: `engine.optimizer` of any stage."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

    optimizer.zero_grad(set_to_none=True)
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.clear_hp_grads()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        # Otherwise the next backward would add to the rest instead of starting from zero.
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
