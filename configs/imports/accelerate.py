"""accelerate's configuration file: DDP, FSDP of both versions, DeepSpeed, ParallelismConfig, Megatron-LM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.imports import deepspeed, sharding
from configs.imports.fields import Field, Handler, Source, Unreadable, by_table, flatten, translate

NAME = "accelerate"
SECTIONS = ("accelerate",)
# The fields that each kind of run reads, besides those that every kind reads.
READS = {
    "FSDP": "fsdp_config",
    "DEEPSPEED": "deepspeed_config",
    "MEGATRON_LM": "megatron_lm_config",
}
REPLICATED = ("MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA")


def recognise(tree: Mapping[str, Any]) -> bool:
    return "distributed_type" in tree or "compute_environment" in tree


def fields(source: Source, problems: list[str]) -> Iterator[Field]:
    kind = _kind(source)
    unread = {section for owner, section in READS.items() if owner != kind}
    special = dict(SPECIAL)
    for name, _ in flatten(source.tree, {}):
        if name.partition(".")[0] in unread:
            special[name] = _unread
    yield from translate(source, special, problems)


def files_named(source: Source) -> Iterator[tuple[str, Any]]:
    """Fields that name a further file."""
    name = "deepspeed_config.deepspeed_config_file"
    if source.get(name) and _kind(source) == "DEEPSPEED":
        yield name, source.get(name)


def _kind(source: Source) -> str:
    return str(source.get("distributed_type", "NO")).upper().rpartition(".")[2]


def _unread(source: Source, name: str, value: Any) -> Field:
    return source.harmless(name, value, f"distributed_type={_kind(source)} does not read it")


def _distributed(source: Source, name: str, value: Any) -> Field:
    kind = _kind(source)
    if kind in ("NO", "FALSE"):
        return source.translated(name, value, {"parallel.dp_replicate": 1}, implied=True)
    if source.get("parallelism_config") and kind != "DEEPSPEED":
        return source.harmless(name, value, "parallelism_config says the degrees")
    if kind in REPLICATED:
        return source.translated(name, value, {"parallel.dp_replicate": None})
    if kind == "FSDP":
        return source.translated(name, value, {"parallel.dp_shard": None}, implied=True)
    if kind == "DEEPSPEED":
        named = source.get("deepspeed_config.deepspeed_config_file") or source.get("deepspeed_config.zero_stage") == 0
        settings = {} if named else {**deepspeed.stage(2), "parallel.engine": "deepspeed"}
        return source.translated(name, value, settings, implied=True)
    if kind == "MEGATRON_LM":
        return source.harmless(name, value, "megatron_lm_config says the degrees")
    if kind in ("XLA", "TPU"):
        return source.lost(name, value, "there is no TPU; the run would use one process")
    raise Unreadable(f"choose NO, {', '.join(REPLICATED)}, {', '.join(READS)}")


def _processes(source: Source, name: str, value: Any) -> Field:
    machines = source.get("num_machines", 1) or 1
    if not isinstance(value, int) or not isinstance(machines, int) or value % machines:
        raise Unreadable(f"must be a multiple of num_machines={machines}")
    if value < 1:
        return source.harmless(name, value, "the launcher says it")
    return source.translated(name, value, {"cluster.gpus_per_node": value // machines})


def _per_node(source: Source) -> int | None:
    processes, machines = source.get("num_processes"), source.get("num_machines", 1) or 1
    return processes // machines if isinstance(processes, int) and processes > 0 else None


def _strategy(source: Source, name: str, value: Any) -> Field:
    return sharding.strategy(source, name, value, _per_node(source))


def _reshard(source: Source, name: str, value: Any) -> Field:
    return sharding.reshard(source, name, value, _per_node(source))


def _stage(source: Source, name: str, value: Any) -> Field:
    if value not in (0, 1, 2, 3):
        raise Unreadable("choose 0, 1, 2, 3")
    return source.translated(name, value, deepspeed.stage(value))


def _file(source: Source, name: str, value: Any) -> Field:
    if "deepspeed" in source.together:
        return source.harmless(name, value, "that file is read as well")
    return source.lost(name, value, "that file is not here; give it too, else the stage of ZeRO is 2")


def _clipping(source: Source, name: str, value: Any) -> Field | None:
    return source.harmless(name, value, "it is not set") if str(value).lower() in ("none", "auto") else None


def _distributed_optimizer(source: Source, name: str, value: Any) -> Field:
    if str(value).lower() == "true":
        settings = {"parallel.dp_shard": None, "parallel.reshard_after_forward": False}
        return source.translated(name, value, settings, "states are sharded over the data-parallel ranks (as ZeRO 1)")
    return source.translated(name, value, {"parallel.dp_replicate": None})


def _mixed(source: Source, name: str, value: Any) -> Field:
    """The Trainer's own bf16 and fp16 override it if they are true."""
    found = by_table(source, name, value)
    found.implied = frozenset(found.settings)
    return found


SPECIAL: dict[str, Handler] = {
    "distributed_type": _distributed,
    "num_processes": _processes,
    "mixed_precision": _mixed,
    "fsdp_config.fsdp_sharding_strategy": _strategy,
    "fsdp_config.fsdp_reshard_after_forward": _reshard,
    "deepspeed_config.zero_stage": _stage,
    "deepspeed_config.deepspeed_config_file": _file,
    "deepspeed_config.gradient_clipping": _clipping,
    "megatron_lm_config.megatron_lm_use_distributed_optimizer": _distributed_optimizer,
}
