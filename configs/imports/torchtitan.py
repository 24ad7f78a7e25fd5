"""torchtitan's TOML files: JobConfig, until Python modules replaced it in February 2026."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.imports.fields import Field, Handler, Source, Unreadable, flatten, translate

NAME = "torchtitan"
SECTIONS = ("torchtitan",)
MARKS = {"job", "training", "parallelism", "metrics", "activation_checkpoint", "lr_scheduler", "experimental"}
# Its models, by name and flavor, that are options here.
MODELS = {
    ("llama3", "8B"): "llama3_1_8b",
    ("llama3", "70B"): "llama3_1_70b",
    ("llama3", "405B"): "llama3_1_405b",
    ("qwen3", "8B"): "qwen3_8b",
    ("qwen3", "30B-A3B"): "qwen3_30b_a3b",
    ("qwen3", "235B-A22B"): "qwen3_235b_a22b",
    ("deepseek_v3", "671B"): "deepseek_v3",
    ("gpt_oss", "20b"): "gpt_oss_20b",
    ("gpt_oss", "120b"): "gpt_oss_120b",
}
FLOAT8 = {"float8": "tensorwise", "quantize.linear.float8": "tensorwise", "mx": "mxfp8", "quantize.linear.mx": "mxfp8"}


def recognise(tree: Mapping[str, Any]) -> bool:
    return sum(isinstance(tree.get(name), Mapping) for name in MARKS) >= 2


def fields(source: Source, problems: list[str]) -> Iterator[Field]:
    special = dict(SPECIAL)
    for name, _ in flatten(source.tree, {}):
        section = name.rpartition(".")[0]
        if (
            section in ("checkpoint", "validation")
            and not name.startswith("checkpoint.initial")
            and not _on(source, section)
        ):
            special.setdefault(name, _off)
        elif name.startswith("quantize.") and not source.get("model.converters"):
            special[name] = _no_converter
    for name in ("checkpoint.enable", "checkpoint.enable_checkpoint", "validation.enable"):
        special.pop(name, None)
    # An older name of the same field: the newer name's default does not apply.
    older = {"checkpoint.enable"} if source.get("checkpoint.enable_checkpoint") is not None else set()
    for each in translate(source, special, problems):
        unused = each.name in ("checkpoint.keep_latest_k", "checkpoint.interval") and not _on(source, "checkpoint")
        if each.given or not (unused or each.name in older):
            yield each


def _on(source: Source, section: str) -> bool:
    return bool(source.get(f"{section}.enable", source.get(f"{section}.enable_checkpoint", False)))


def _off(source: Source, name: str, value: Any) -> Field:
    return source.harmless(name, value, f"{name.rpartition('.')[0]}.enable=false")


def _no_converter(source: Source, name: str, value: Any) -> Field:
    return source.harmless(name, value, "model.converters names none")


def _name(source: Source, name: str, value: Any) -> Field:
    return source.harmless(name, value, "model.flavor says the model")


def _flavor(source: Source, name: str, value: Any) -> Field:
    family = source.get("model.name", "llama3")
    if (option := MODELS.get((family, str(value)))) is not None:
        return source.translated(name, value, {"model": option})
    return source.lost(name, value, f"{family} {value} is no option here; give model=OPTION or model.path=FOLDER")


def _assets(source: Source, name: str, value: Any) -> Field:
    return source.translated(name, value, {"data.tokenizer": value}, "weights come with model.path alone")


def _converters(source: Source, name: str, value: Any) -> Field:
    chosen = value if isinstance(value, list) else [value]
    if not chosen:
        return source.harmless(name, value, "as here")
    unknown = [str(each) for each in chosen if each not in FLOAT8]
    if unknown:
        return source.lost(name, value, f"{', '.join(unknown)}: only linear layers in float8 or mxfp8 exist here")
    return source.translated(name, value, {"precision.float8.recipe": FLOAT8[chosen[0]]}, implied=True)


def _decay(source: Source, name: str, value: Any) -> Field:
    if value not in ("linear", "cosine", "sqrt"):
        raise Unreadable("choose linear, cosine, sqrt")
    partial = source.get("lr_scheduler.decay_ratio") is not None
    kind = {"linear": "warmup_stable_decay" if partial else "linear", "cosine": None if partial else "cosine"}.get(
        value
    )
    if kind is None:
        where = " over a part of the run" if partial else ""
        return source.lost(
            name, value, f"no {value} decay{where} exists here, the run would follow scheduler.name=cosine"
        )
    why = "the last step has a rate above the minimum there, and the minimum here"
    return source.translated(name, value, {"scheduler.name": kind}, why)


def _decay_ratio(source: Source, name: str, value: Any) -> Field:
    if value is None or source.get("lr_scheduler.decay_type", "linear") != "linear":
        return source.harmless(name, value, "lr_scheduler.decay_type says what is missing")
    return source.translated(name, value, {"~decay_ratio": float(value)})


def _warmup(source: Source, name: str, value: Any) -> Field:
    """torchtitan caps it at the number of steps."""
    if not isinstance(value, int):
        raise Unreadable("must be a whole number")
    return source.translated(name, value, {"~warmup_steps": value})


def _dataset(source: Source, name: str, value: Any) -> Field:
    if source.get("training.dataset_path"):
        return source.harmless(name, value, "training.dataset_path says where it is")
    if value == "c4":
        settings = {"data.source": "hub", "data.name": "allenai/c4", "data.subset": "en"}
        return source.translated(name, value, settings)
    return source.lost(name, value, "it is in torchtitan's own folder; give data=files data.paths=[...]")


def _dataset_path(source: Source, name: str, value: Any) -> Field:
    if not value:
        return source.harmless(name, value, "it is not set")
    return source.translated(name, value, {"data.paths": [value], "data.source": "files"})


def _batch(source: Source, name: str, value: Any) -> Field | None:
    """In a pipeline the local batch is what flows through the stages, in micro-batches."""
    accumulates = (source.get("training.global_batch_size", -1) or -1) > 0
    if source.get("parallelism.pipeline_parallel_degree", 1) > 1:
        micro = source.get("parallelism.pipeline_parallel_microbatch_size", 1)
        settings = {"train.micro_batch_size": micro}
        if not accumulates:
            settings["train.gradient_accumulation_steps"] = value // micro
        return source.translated(name, value, settings, "micro-batches of a pipeline")
    if accumulates:
        return None
    return source.translated(name, value, {"train.micro_batch_size": value, "train.gradient_accumulation_steps": 1})


def _global_batch(source: Source, name: str, value: Any) -> Field | None:
    return source.harmless(name, value, "without accumulation") if isinstance(value, int) and value <= 0 else None


def _microbatch(source: Source, name: str, value: Any) -> Field:
    return source.harmless(name, value, "training.local_batch_size is divided by it")


def _shard(source: Source, name: str, value: Any) -> Field | None:
    return source.translated(name, value, {"parallel.dp_shard": None}, "what the world leaves") if value == -1 else None


def _tensor(source: Source, name: str, value: Any) -> Field | None:
    if value == 1:
        return None
    why = "torchtitan's tensor parallel is sequence parallel too"
    return source.translated(name, value, {"parallel.tp": value, "parallel.sequence_parallel": True}, why)


def _context(source: Source, name: str, value: Any) -> Field:
    settings: dict[str, Any] = {"parallel.cp": value}
    if value > 1 and source.get("parallelism.context_parallel_rotate_method", "allgather") == "allgather":
        settings["parallel.context_method"] = "gather"
    return source.translated(name, value, settings)


def _rotate(source: Source, name: str, value: Any) -> Field | None:
    if source.get("parallelism.context_parallel_degree", 1) == 1:
        return source.harmless(name, value, "parallelism.context_parallel_degree=1")
    return None


def _selective(source: Source, name: str, value: Any) -> Field | None:
    mode = source.get("activation_checkpoint.mode", "selective")
    return source.harmless(name, value, f"mode={mode} does not read it") if mode != "selective" else None


def _validation_steps(source: Source, name: str, value: Any) -> Field:
    if not _on(source, "validation"):
        return _off(source, name, value)
    return source.lost(name, value, "validation is counted in sequences: give train.eval_samples=N")


def _validation_data(source: Source, name: str, value: Any) -> Field:
    if not _on(source, "validation"):
        return _off(source, name, value)
    if name.endswith("_path") and value:
        return source.translated(name, value, {"data.validation_paths": [value]})
    return source.lost(name, value, "a part of the documents is held out, unless data.validation_paths names others")


def _keep(source: Source, name: str, value: Any) -> Field | None:
    if not _on(source, "checkpoint"):
        return _off(source, name, value)
    return (
        source.lost(name, value, "2 checkpoints stay, unless checkpoint.keep_every says more") if value == 0 else None
    )


def _resume(source: Source, name: str, value: Any) -> Field:
    if not value:
        return source.harmless(name, value, "it is not set")
    return source.lost(name, value, "the run begins with model.path; train.resume=FOLDER goes on from a step-N")


SPECIAL: dict[str, Handler] = {
    "model.name": _name,
    "model.flavor": _flavor,
    "model.hf_assets_path": _assets,
    "model.converters": _converters,
    "lr_scheduler.decay_type": _decay,
    "lr_scheduler.warmup_steps": _warmup,
    "lr_scheduler.decay_ratio": _decay_ratio,
    "training.dataset": _dataset,
    "training.dataset_path": _dataset_path,
    "training.local_batch_size": _batch,
    "training.batch_size": _batch,
    "training.global_batch_size": _global_batch,
    "parallelism.pipeline_parallel_microbatch_size": _microbatch,
    "parallelism.data_parallel_shard_degree": _shard,
    "parallelism.tensor_parallel_degree": _tensor,
    "parallelism.context_parallel_degree": _context,
    "parallelism.context_parallel_rotate_method": _rotate,
    "activation_checkpoint.selective_ac_option": _selective,
    "checkpoint.keep_latest_k": _keep,
    "checkpoint.initial_load_path": _resume,
    "validation.steps": _validation_steps,
    "validation.dataset": _validation_data,
    "validation.dataset_path": _validation_data,
}
