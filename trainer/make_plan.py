"""Config in, Plan out: every rule and every derived number of a run, without torch and before any process starts.

The launcher, the estimator and the trainer share the plan: world size, mesh, batch, dtypes, partitioning and offload.
No later code derives these again.

    global_batch_size = micro_batch_size * gradient_accumulation_steps * dp_replicate * dp_shard

It reads the config and a `Machine`. `rules` holds the checks. Next: `runtime`, where the plan meets the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from configs.choices import EngineName, LauncherName, OffloadDevice
from configs.errors import PlanError
from configs.schema import Config
from trainer import linear, update
from trainer.axes import AXES, SHARD, expert, shard
from trainer.axes import degrees as degrees_of
from trainer.axes.pipeline.table import check_pipeline
from trainer.axes.pipeline.timeline import bubble_fraction
from trainer.engine.deepspeed import settings as deepspeed
from trainer.plan.batch import BatchPlan, plan_batch
from trainer.plan.length import planned_steps
from trainer.plan.machine import Machine
from trainer.plan.model_fields import config_fields, sizes
from trainer.plan.plan import Plan
from trainer.plan.views import DENSE, View
from trainer.rules import check_config

CPU_PROCESSES = 2  # default on a machine without GPUs, for a layout that is open to any world size


def make_plan(config: Config, machine: Machine) -> Plan:
    """Derive the plan. Raises PlanError with every problem at once, each naming key, value, rule and remedy."""
    problems: list[str] = []
    gpus_per_node = _processes_per_node(config, machine, problems)
    view = _dense_view(config, config.cluster.nodes * gpus_per_node, problems)
    experts = expert.view(config, view, problems)
    problems = [*check_config(config, machine.device(config.cluster.device), view), *problems]
    data_parallel_size = view.size(lambda axis: axis.reads)
    # A pipeline with fewer micro-batches waits for more than a third of the time.
    usual = 2 * config.parallel.pp if config.parallel.pp > 1 else 1
    batch = plan_batch(config.train, config.data.seq_len, data_parallel_size, problems, usual=usual)
    if config.parallel.pp > 1 and config.parallel.engine is EngineName.torch:
        problems += _check_pipeline(config, batch)
    problems += _check_offload(config, view)
    problems += [*deepspeed.check_groups(config, view.degrees[SHARD]), *shard.check_groups(config, view)]
    problems += update.problems(config, batch)
    if problems:
        raise PlanError(*problems)
    return Plan(
        device=machine.device(config.cluster.device),
        nodes=config.cluster.nodes,
        gpus_per_node=gpus_per_node,
        views=(view,) if experts is None else (view, experts),
        engine=config.parallel.engine,
        zero_stage=config.parallel.zero_stage,
        offload_optimizer=config.parallel.offload.optimizer,
        offload_parameters=config.parallel.offload.parameters,
        batch=batch,
        param_dtype=config.precision.param_dtype,
        reduce_dtype=config.precision.reduce_dtype,
        master_dtype=config.precision.master_dtype,
        reshard_after_forward=_reshard(config),
        fsdp=config.parallel.fsdp,
        bubble=_bubble(config, batch),
        steps=planned_steps(config),
        epochs=config.train.epochs,
        layers=linear.description(config),
    )


def _processes_per_node(config: Config, machine: Machine, problems: list[str]) -> int:
    """cluster.gpus_per_node, or the launcher's number, or the layout's requirement, or the machine's GPUs."""
    nodes, asked = config.cluster.nodes, config.cluster.gpus_per_node
    degrees = tuple(degrees_of(config).values())
    fixed = prod(d for d in degrees if d is not None)
    if machine.world_size is not None:
        planned = asked * nodes if asked is not None else machine.world_size
        if planned != machine.world_size:
            problems.append(
                f"cluster.gpus_per_node={asked}: with cluster.nodes={nodes} the plan is {planned} processes, but the"
                f" launcher started WORLD_SIZE={machine.world_size}; start {planned} or leave cluster.gpus_per_node out"
            )
        return asked or max(1, machine.world_size // nodes)
    if asked is not None:
        if machine.device(config.cluster.device) == "cpu" and machine.cores and asked > _most_processes(machine.cores):
            problems.append(
                f"cluster.gpus_per_node={asked}: each is a process of its own, and this machine has {machine.cores}"
                f" CPU cores; use {_most_processes(machine.cores)} or fewer"
            )
        return asked
    if config.launcher.name is LauncherName.python:
        return 1
    if None not in degrees:
        return max(1, fixed // nodes)
    if machine.device(config.cluster.device) == "cuda":
        return machine.gpus
    return max(CPU_PROCESSES, fixed)


def _most_processes(cores: int) -> int:
    """Ranks on the CPU share cores in tests and demonstrations, but each takes half a GiB for the libraries."""
    return max(32, 4 * cores)


def _dense_view(config: Config, world_size: int, problems: list[str]) -> View:
    """Fill in the degree that is null and check that the product of all degrees is the world size."""
    degrees = degrees_of(config)
    open_axes = [name for name, size in degrees.items() if size is None]
    fixed = prod(size for size in degrees.values() if size)
    named = [f"{name} {size}" for name, size in degrees.items() if size is not None and size > 1]
    product = " * ".join(named) or "1"
    if len(open_axes) > 1:
        problems.append(
            f"parallel.{open_axes[0]}=null, parallel.{open_axes[1]}=null: at most one degree can be filled"
            " from the world size; set the other to a number"
        )
    elif open_axes and world_size % fixed:
        problems.append(
            f"parallel.{open_axes[0]}=null: {world_size} processes are not divisible by {product};"
            " change that degree or cluster.gpus_per_node"
        )
    elif not open_axes and fixed != world_size:
        problems.append(
            f"parallel: {product} = {fixed}, but there are {world_size} processes"
            f" (cluster.nodes * cluster.gpus_per_node); set one degree to null to fill it, or start {fixed}"
        )
    filled = max(1, world_size // fixed)
    chosen = {name: filled if size is None else size for name, size in degrees.items()}
    return View(DENSE, tuple((axis, chosen[axis.name]) for axis in AXES if DENSE in axis.views))


def _reshard(config: Config) -> bool:
    """With a pipeline parameters are kept gathered, because every micro-batch would gather them again."""
    asked = config.parallel.reshard_after_forward
    return asked if asked is not None else config.parallel.pp == 1


def _check_pipeline(config: Config, batch: BatchPlan) -> Iterator[str]:
    pipeline = config.parallel.pipeline
    return check_pipeline(
        pp=config.parallel.pp,
        schedule=pipeline.schedule,
        micro_batches=batch.gradient_accumulation_steps,
        stages_per_rank=pipeline.stages_per_rank,
        num_layers=sizes(config_fields(config)).layers,
        split=pipeline.split,
        checkpointing=str(config.train.activation_checkpointing),
        compile=config.train.compile,
    )


def _check_offload(config: Config, view: View) -> Iterator[str]:
    """Engine torch offloads through FSDP2, which does not handle plain copies of the model."""
    offloaded = config.parallel.offload.parameters
    if config.parallel.engine is EngineName.torch and offloaded is OffloadDevice.cpu and not view.is_sharded:
        yield (
            f"parallel.offload.parameters={offloaded}: engine torch offloads what is sharded, and here every process"
            " holds the whole model; use parallel=fsdp_offload with two or more processes, or parallel=zero3_offload"
        )


def _bubble(config: Config, batch: BatchPlan) -> float:
    pipeline, pp = config.parallel.pipeline, config.parallel.pp
    if pp == 1:
        return 0.0
    micro_batches, per_rank = batch.gradient_accumulation_steps, pipeline.stages_per_rank
    return bubble_fraction(pipeline.schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=per_rank)
