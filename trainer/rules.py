"""Combinations that cannot be trained, and why: each rule yields one line with key, value, rule and remedy.

Torch-free. Rules here need only the config. Rules that need the world size are in `plan`; those that need the job's
machine (libraries, disks) are in `preflight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from configs.choices import (
    BYTES,
    Attention,
    Checkpointing,
    ClusterKind,
    DType,
    EngineName,
    LauncherName,
    MissingWeights,
    OffloadDevice,
    Weights,
)
from configs.errors import PlanError
from configs.schema import Cluster, Config, Model, Offload
from trainer import axes, linear, moe
from trainer.checkpoint import selection
from trainer.data.rules import check_data
from trainer.engine.deepspeed import settings as deepspeed
from trainer.model.custom import introduce
from trainer.optim.rules import check_optimizer
from trainer.plan.devices import check_gpu
from trainer.plan.length import check_length
from trainer.plan.model_fields import check_sizes, config_fields, sizes
from trainer.plan.trackers import check_tracker
from trainer.plan.views import View

OF_THE_PLAN = MappingProxyType({
    **dict.fromkeys(("nproc_per_node", "num_processes", "num_gpus"), "set cluster.gpus_per_node"),
    **dict.fromkeys(("nnodes", "num_machines", "num_nodes"), "set cluster.nodes"),
    **dict.fromkeys(("master_port", "main_process_port"), "set launcher.master_port"),
    **dict.fromkeys(("node_rank", "machine_rank", "master_addr", "main_process_ip", "hostfile"), "leave it out"),
    **dict.fromkeys(("rdzv_backend", "rdzv_endpoint", "rdzv_id", "standalone", "module"), "leave it out"),
})  # fmt: skip
"""Launcher flags that would start other ranks than the plan has, or change their rendezvous."""


def check_config(config: Config, device: str, view: View) -> Iterator[str]:
    """All problems of a config whose numbers lie in their ranges, in the order of its sections. device: "cpu" or
    "cuda".
    view: the plan's dense view of its ranks."""
    yield from _check_model(config, device)
    yield from check_data(config)
    yield from _check_parallel(config)
    yield from axes.problems(config)
    yield from _check_compile(config)
    yield from _check_precision(config)
    yield from linear.problems(config)
    yield from moe.problems(config)
    yield from check_optimizer(config, device, view)
    yield from selection.problems(config)
    yield from check_gpu(config.cluster.gpu)
    yield from _check_cluster(config.cluster)
    yield from check_tracker(config.logging)
    yield from _check_measuring(config, device)
    yield from check_length(config)
    yield from _check_run_dir(config.train.run_dir)
    yield from _check_launcher(config)


def _check_launcher(config: Config) -> Iterator[str]:
    if config.launcher.name is LauncherName.python and (config.cluster.gpus_per_node or 1) * config.cluster.nodes != 1:
        yield "launcher.name=python: starts one process only; use launcher=torchrun for more"
    for word in config.launcher.args:
        # torchrun accepts each of its flags with dashes and with underscores.
        remedy = OF_THE_PLAN.get(word.partition("=")[0].lstrip("-").replace("-", "_"))
        if word.startswith("-") and remedy is not None:
            yield f"launcher.args=[{word}]: the plan decides it, and ranks started otherwise would refuse; {remedy}"


def _check_model(config: Config, device: str) -> Iterator[str]:
    model, given = config.model, config_fields(config)
    yield from check_sizes(given, model)
    yield from _check_own_model(model)
    if model.path is None and model.target is None and "model_type" not in given:
        yield (
            "model.path=null: give a preset (model=tiny), a folder or hub id (model.path=...), or"
            " model.config.model_type"
        )
    if model.path is None and model.weights is Weights.pretrained:
        yield "model.weights=pretrained: needs model.path, the folder or hub id to read them from"
    if model.resize_vocabulary and model.path is None:
        yield "model.resize_vocabulary=true: is for a model of model.path; set model.config.vocab_size instead"
    if model.missing_weights is MissingWeights.random and model.weights is not Weights.pretrained:
        yield "model.missing_weights=random: is for model.weights=pretrained; leave it out, all weights are random"
    if model.trust_remote_code and model.revision is None and not Path(model.path or "").expanduser().is_dir():
        yield (
            "model.trust_remote_code=true: needs model.revision=COMMIT, so that the code that runs is the code you"
            " have read"
        )
    positions = sizes(given).positions
    if positions is not None and config.data.seq_len > positions:
        yield (
            f"data.seq_len={config.data.seq_len}: the model has {positions} positions;"
            f" use {positions} or less, or set model.config.max_position_embeddings"
        )
    if model.attention is Attention.flash_attention_2:
        if device != "cuda":
            yield f"model.attention=flash_attention_2: needs an NVIDIA GPU, this run is on {device}; use sdpa"
        if config.precision.param_dtype not in (DType.bfloat16, DType.float16):
            yield (
                f"model.attention=flash_attention_2: computes in 16 bit only, precision.param_dtype is"
                f" {config.precision.param_dtype}; use precision=bf16"
            )


def _check_own_model(model: Model) -> Iterator[str]:
    if model.target is None:
        return
    key = f"model.target={model.target}"
    if model.architecture and model.path is None:
        yield f"{key}: is an architecture of its own, and model={model.preset} is another; add model=custom"
    if "model_type" in model.config:
        yield f"model.config.model_type={model.config['model_type']}: {key} says which it is; leave it out"
    if model.trust_remote_code:
        yield f"model.trust_remote_code=true: {key} names the code that runs; leave it out"
    try:
        introduce(model)
    except PlanError as error:
        yield from error.problems


def _check_cluster(cluster: Cluster) -> Iterator[str]:
    """Each kind of cluster reads only the section of its name."""
    for kind in ClusterKind:
        section: Any = getattr(cluster, kind, None)
        if section is None or kind is cluster.kind:
            continue
        plain = type(section)()
        for name in (field.name for field in fields(section)):
            value = getattr(section, name)
            if value != getattr(plain, name):
                yield (
                    f"cluster.{kind}.{name}={value}: is read with cluster.kind={kind} alone, and this is"
                    f" cluster.kind={cluster.kind}; set that kind, or leave it out"
                )


def _check_parallel(config: Config) -> Iterator[str]:
    parallel, offload = config.parallel, config.parallel.offload
    yield from deepspeed.problems(config)
    offloads = [("optimizer", offload.optimizer), ("parameters", offload.parameters)]
    if parallel.engine is EngineName.torch:
        if parallel.zero_stage:
            yield f"parallel.zero_stage={parallel.zero_stage}: needs parallel.engine=deepspeed"
        yield from _check_torch_offload(parallel.offload)
        return
    if parallel.zero_stage == 0:
        yield (
            "parallel.zero_stage=0: DeepSpeed without partitioning steps once on empty gradients in 16 bit and then"
            " trains differently; use parallel=ddp, or stage 1"
        )
    if parallel.zero_stage != 3:
        if offload.parameters is not OffloadDevice.none:
            yield (
                f"parallel.offload.parameters={offload.parameters}: only stage 3 partitions parameters, this is stage"
                f" {parallel.zero_stage}; use parallel=zero3 or parallel.offload.parameters=none"
            )
        if offload.optimizer is OffloadDevice.nvme:
            yield (
                f"parallel.offload.optimizer=nvme: only stage 3 swaps to NVMe, this is stage {parallel.zero_stage};"
                " use parallel=zero3 or parallel.offload.optimizer=cpu"
            )
    elif config.train.activation_checkpointing is Checkpointing.selective:
        yield (
            "train.activation_checkpointing=selective: ZeRO 3 gathers parameters inside the layers, and the recompute"
            " cannot tell that from the layers' own work; use full"
        )
    nvme = [what for what, where in offloads if where is OffloadDevice.nvme]
    if nvme and offload.nvme_path is None:
        yield f"parallel.offload.nvme_path=null: parallel.offload.{nvme[0]}=nvme needs a folder on a local NVMe disk"
    if offload.nvme_path is not None and not nvme:
        yield f"parallel.offload.nvme_path={offload.nvme_path}: nothing is offloaded to nvme; set it to null"


def _check_compile(config: Config) -> Iterator[str]:
    if not config.train.compile:
        return
    if config.parallel.engine is EngineName.deepspeed:
        yield "train.compile=true: engine torch only; set it to false, or use parallel=fsdp"
    elif config.train.activation_checkpointing is Checkpointing.selective and (tp := config.parallel.tp) > 1:
        yield (
            f"train.activation_checkpointing=selective: with parallel.tp={tp} a layer puts parts of its parameters in"
            " place while it runs, which train.compile=true does not trace inside a recompute; use full or none, or"
            " train.compile=false"
        )


def _check_torch_offload(offload: Offload) -> Iterator[str]:
    """FSDP2 offloads parameters, gradients and optimizer states together, and only to host memory."""
    both = (offload.optimizer, offload.parameters)
    if OffloadDevice.nvme in both:
        yield "parallel.offload: nvme needs parallel.engine=deepspeed; use parallel=zero3_nvme"
    elif len(set(both)) > 1:
        yield (
            f"parallel.offload.optimizer={offload.optimizer}, parallel.offload.parameters={offload.parameters}: engine"
            " torch offloads both or none; set both to cpu, or use parallel=zero3_offload"
        )


def _check_precision(config: Config) -> Iterator[str]:
    precision = config.precision
    if precision.loss_scale is not None and precision.param_dtype is not DType.float16:
        yield f"precision.loss_scale={precision.loss_scale}: only float16 scales the loss; set it to null"
    if precision.param_dtype is DType.float16 and precision.master_dtype is DType.float16:
        yield "precision.master_dtype=float16: updates smaller than a float16 step are lost; use float32"
    if BYTES[precision.master_dtype] < BYTES[precision.param_dtype]:
        yield (
            f"precision.master_dtype={precision.master_dtype}: is narrower than precision.param_dtype="
            f"{precision.param_dtype}; use at least {precision.param_dtype}"
        )
    if config.parallel.engine is EngineName.torch:
        allowed = {precision.master_dtype, DType.bfloat16, DType.float16}
        if precision.reduce_dtype not in allowed:
            yield (
                f"precision.reduce_dtype={precision.reduce_dtype}: engine torch reduces in precision.master_dtype="
                f"{precision.master_dtype} or compressed to 16 bit; use one of {', '.join(sorted(allowed))}"
            )
    else:
        for key, value in (("param_dtype", precision.param_dtype), ("reduce_dtype", precision.reduce_dtype)):
            if value is DType.float64:
                yield f"precision.{key}=float64: DeepSpeed has no float64; use precision=fp32, or engine torch"
        if precision.master_dtype is not DType.float32:
            yield f"precision.master_dtype={precision.master_dtype}: DeepSpeed's master weights are float32; use that"


def _check_measuring(config: Config, device: str) -> Iterator[str]:
    if not config.estimate.measure:
        return
    if device != "cpu":
        yield f"estimate.measure=true: is for the CPU, this run is on {device}, whose allocator counts; set it to false"
    if config.train.compile:
        yield "estimate.measure=true: counts operator by operator, which train.compile=true fuses; set one to false"


def _check_run_dir(run_dir: str | None) -> Iterator[str]:
    """A run's files, some of which it deletes, need a folder of their own."""
    if run_dir is None:
        return
    try:
        folder = Path(run_dir).expanduser().resolve()
        shared = {Path("/"): "the root", Path.home().resolve(): "the home folder", Path.cwd(): "the current folder"}
    except (OSError, RuntimeError) as error:
        yield f"train.run_dir={run_dir}: cannot be found ({error}); choose another folder"
        return
    if folder in shared:
        yield f"train.run_dir={run_dir}: is {shared[folder]}; a run needs a folder of its own, such as runs/NAME"
