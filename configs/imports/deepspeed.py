"""DeepSpeed's JSON, with the "auto" that transformers' Trainer fills in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.foreign import Fate, look_up, table
from configs.imports.fields import Field, Handler, Source, Unreadable, by_table, show, translate
from configs.zero_settings import READ, is_plain

NAME = "DeepSpeed"
SECTIONS = ("deepspeed",)
MARKS = {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "zero_allow_untested_optimizer"}
# DeepSpeed's defaults, in elements.
SIZES = {
    "reduce_bucket_size": 5 * 10**8,
    "sub_group_size": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": 10**5,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
}
OWN = "parallel.deepspeed."
# Values that transformers' Trainer fills in for "auto", from the model's hidden size.
FROM_HIDDEN = {
    "zero_optimization.reduce_bucket_size": lambda hidden: hidden * hidden,
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
FILLED = "auto: the Trainer's arguments say it"
UNFILLED = "auto: the Trainer's arguments fill it, and no file holds them; give that file too, or the key here: "


def recognise(tree: Mapping[str, Any]) -> bool:
    return bool(MARKS & tree.keys()) or any(isinstance(tree.get(name), Mapping) for name in ("bf16", "fp16"))


def fields(source: Source, problems: list[str]) -> Iterator[Field]:
    special: dict[str, Handler] = {
        **SPECIAL,
        **{name: _auto for name, value in _leaves(source.tree) if value == "auto"},
    }
    if isinstance(source.get("zero_optimization"), Mapping):
        del special["zero_optimization"]
    special |= {name: _off for name, _ in _leaves(source.tree) if _is_off(source, name)}
    for each in translate(source, special, problems):
        # Defaults of an absent section do not apply.
        if each.given or "." not in each.name or each.name.partition(".")[0] in _sections(source):
            yield each
    if source.get("zero_optimization.stage") is None and not isinstance(source.get("zero_optimization"), bool):
        for each in _stage(source, "zero_optimization.stage", 0):
            each.given = False  # DeepSpeed's default
            yield each


def automatic(fields: list[Field]) -> list[Field]:
    """Sizes that the Trainer computes from the model."""
    return [each for each in fields if each.value == "auto" and each.name in FROM_HIDDEN and each.fate is Fate.lost]


def fill(fields: list[Field], settings: dict[str, Any], hidden: int) -> None:
    """Compute them as the Trainer does."""
    for each in automatic(fields):
        line = look_up("deepspeed", each.name)
        assert line is not None and line.key is not None
        if line.key in settings:
            continue
        settings[line.key] = FROM_HIDDEN[each.name](hidden)
        each.fate, each.settings = Fate.translated, {line.key: settings[line.key]}
        each.why = f"as the Trainer computes it from a hidden size of {hidden}"


def leave_unread(fields: list[Field], settings: dict[str, Any], compute: str) -> None:
    """Drop settings that the optimizer of stage 1 in bfloat16 does not read. compute: the run's
    `precision.param_dtype`, which another file or the command line may give."""
    if not _is_plain(settings, compute):
        return
    for each in fields:
        for key in [key for key in each.settings if key.startswith(OWN)]:
            name = key.removeprefix(OWN)
            if name in READ and not READ[name].plain:
                settings.pop(key, None)
                del each.settings[key]
                each.fate, each.why = Fate.harmless, "stage 1 reduces gradients in bfloat16 as a whole"


def _is_plain(settings: dict[str, Any], compute: str) -> bool:
    stage, offload = settings.get("parallel.zero_stage", 0), settings.get("parallel.offload.optimizer", "none")
    return is_plain(stage=stage, compute=compute, offload=offload)


def follow(settings: dict[str, Any], compute: str) -> list[str]:
    """Complete our keys with DeepSpeed's default sizes and gradient dtype, so that an estimate matches a run under its
    trainer. Returns one line for each added key. compute: as for `leave_unread`."""
    number = settings.get("parallel.zero_stage", 0)
    if "nvme" in (settings.get("parallel.offload.optimizer"), settings.get("parallel.offload.parameters")):
        return []
    names = [name for name in SIZES if number == 3 or (number and name == "reduce_bucket_size")]
    added: dict[str, Any] = {f"{OWN}{name}": SIZES[name] for name in names}
    if _is_plain(settings, compute):
        added = {}
    if settings.get(f"{OWN}stage3_allgather_sequential"):
        added.pop(f"{OWN}stage3_prefetch_bucket_size", None)
    if number == 3 and compute in ("bfloat16", "float16"):
        added[f"{OWN}grad_accum_dtype"] = compute
    added = {key: size for key, size in added.items() if key not in settings}
    settings.update(added)
    return [f"{key}={show(size)}, which is DeepSpeed's default" for key, size in added.items()]


def stage(number: int) -> dict[str, Any]:
    """Our keys of a stage of ZeRO."""
    if number == 0:
        return {"parallel.dp_replicate": None}
    return {"parallel.engine": "deepspeed", "parallel.zero_stage": number, "parallel.dp_shard": None}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_off(source: Source, name: str) -> bool:
    """Whether a field lies in a section with enabled=false; such a section is not read further."""
    section, _, last = name.rpartition(".")
    return last != "enabled" and bool(section) and source.get(f"{section}.enabled") is False


def _sections(source: Source) -> set[str]:
    """The sections that are present and not disabled."""
    return {name for name, value in source.tree.items() if value and source.get(f"{name}.enabled") in (None, True)}


def _off(source: Source, name: str, value: Any) -> Field:
    return source.harmless(name, value, f"{name.rpartition('.')[0]}.enabled=false")


def _auto(source: Source, name: str, value: Any) -> Field | list[Field]:
    line = look_up("deepspeed", name)
    if line is None:
        return Field(file=source.name, name=name, value=value, fate=Fate.unknown, why="no version of it is known here")
    if line.fate is not Fate.translated:
        return Field(file=source.name, name=name, value=value, fate=line.fate, why=line.note)
    if name.startswith("zero_optimization."):
        if name in SPECIAL and (found := SPECIAL[name](source, name, value)) is not None:
            if isinstance(found, Field):
                found.fate = Fate.harmless  # a stage that does not read it, or a disk: no value is lost
            return found
        why = f"it is computed from the model here too, from its parameters: {line.keys[0]}=null"
        return source.lost(name, value, f"{why}; transformers computes it from the hidden size")
    if source.together & {"training_arguments", "axolotl", "llama_factory"}:
        return source.harmless(name, value, FILLED)
    return source.lost(name, value, UNFILLED + ", ".join(line.keys))


def _stage(source: Source, name: str, value: Any) -> list[Field]:
    if value not in (0, 1, 2, 3):
        raise Unreadable("choose 0, 1, 2, 3")
    why = "stage 0 replicates the model, which engine torch does (DDP)" if value == 0 else ""
    return [source.translated(name, value, stage(int(value)), why)]


def _betas(source: Source, name: str, value: Any) -> Field:
    if not isinstance(value, list) or len(value) != 2:
        raise Unreadable("must be two numbers")
    return source.translated(name, value, {"optimizer.beta1": float(value[0]), "optimizer.beta2": float(value[1])})


def _over(source: Source, name: str, value: Any) -> Field:
    """If DeepSpeed's file has an optimizer or scheduler, transformers' Trainer does not create its own."""
    found = by_table(source, name, value)
    found.over = found.fate is Fate.translated
    return found


def _lr(source: Source, name: str, value: Any) -> Field | None:
    if isinstance(source.get("scheduler.params.warmup_max_lr"), (int, float)):
        return source.harmless(name, value, "the scheduler sets it to warmup_max_lr")
    return None


def _loss_scale(source: Source, name: str, value: Any) -> Field | None:
    return source.harmless(name, value, "0 is a dynamic loss scale, as here") if value == 0 else None


def _power(source: Source, name: str, value: Any) -> Field:
    if not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise Unreadable("must be a power of two: 16")
    return source.translated(name, value, {"precision.loss_scale_init": float(2**value)})


def _print(source: Source, name: str, value: Any) -> Field | None:
    if source.together & {"training_arguments", "axolotl", "llama_factory"} or not isinstance(value, int):
        return source.harmless(name, value, "logging.every says when a line of metrics is written")
    return None


def _unread(source: Source, name: str) -> Field | None:
    """Settings that the optimizer of this stage does not read, and those that offload to a disk overrides."""
    line, value = look_up("deepspeed", name), source.get(name)
    assert line is not None and line.key is not None
    read, number = READ[line.key.removeprefix(OWN)], source.get("zero_optimization.stage", 0)
    if number not in read.stages:
        return source.harmless(name, value, f"stage {number} does not read it")
    if not read.disk and "nvme" in _devices(source):
        return source.lost(name, value, "with states on a disk it is computed from the model (docs/nvme-offload.md)")
    return None


def _devices(source: Source) -> list[Any]:
    return [source.get(f"zero_optimization.offload_{what}.device") for what in ("optimizer", "param")]


def _own(source: Source, name: str, value: Any) -> Field | None:
    return _unread(source, name)


def _overlap(source: Source, name: str, value: Any) -> Field | None:
    as_usual = value is None or value == (source.get("zero_optimization.stage") == 3)
    return source.harmless(name, value, "as here") if as_usual else _unread(source, name)


def _prefetch(source: Source, name: str, value: Any) -> Field | None:
    if (found := _unread(source, name)) is not None:
        return found
    if value != 0 and _devices(source)[1] == "nvme":
        return source.lost(name, value, "parameters on a disk are read when they are needed, not ahead")
    sequential = (source.get(f"zero_optimization.{prefix}allgather_sequential") for prefix in ("stage3_", ""))
    if any(each is True for each in sequential):
        return source.harmless(name, value, "stage3_allgather_sequential=true gathers nothing ahead")
    return None


def _contiguous(source: Source, name: str, value: Any) -> Field | None:
    found = _unread(source, name)
    if found is not None or value is not False:
        return found
    if _devices(source)[0] == "cpu" or source.get("zero_optimization.cpu_offload") is True:
        return source.harmless(name, value, "gradients of an offloaded optimizer are always copied into a buffer")
    if source.get("zero_optimization.overlap_comm") is True:
        return source.lost(name, value, "with overlap_comm=true gradients are copied into two buffers")
    return None


def _hpz(source: Source, name: str, value: Any) -> Field | None:
    if value not in (0, 1) and _devices(source)[1] in ("cpu", "nvme"):
        return source.lost(name, value, "with offloaded parameters no second copy of them is kept on the GPU")
    return _unread(source, name)


def _aio(source: Source, name: str, value: Any) -> Field | None:
    return None if "nvme" in _devices(source) else source.harmless(name, value, "nothing is offloaded to a disk")


def _accumulated(source: Source, name: str, value: Any) -> Field | None:
    if value in ("bf16", "fp16") and source.get("zero_optimization.stage") != 3:
        return source.lost(name, value, "below stage 3 gradients add up in precision.master_dtype, float32")
    if value in ("bf16", "fp16") and "nvme" in _devices(source):
        return source.lost(name, value, "with states on a disk gradients add up in precision.master_dtype, float32")
    if value == "fp32" and source.get("zero_optimization.stage") == 3 and "nvme" not in _devices(source):
        return source.translated(name, value, {f"{OWN}grad_accum_dtype": "float32"})
    return None


def _mics(source: Source, name: str, value: Any) -> Field:
    if value in (-1, None):
        return source.harmless(name, value, "as here")
    return source.lost(
        name,
        value,
        f"parameters are sharded over all data-parallel ranks; parallel=hsdp parallel.dp_shard={value} shards them in"
        " groups, with torch's engine",
    )


SPECIAL: dict[str, Handler] = {
    "zero_optimization": _stage,  # true or false, the form of 2020
    "zero_optimization.stage": _stage,
    "optimizer.type": _over,
    "scheduler.type": _over,
    "optimizer.params.betas": _betas,
    "optimizer.params.lr": _lr,
    "fp16.loss_scale": _loss_scale,
    "fp16.initial_scale_power": _power,
    "steps_per_print": _print,
    "zero_optimization.mics_shard_size": _mics,
    **{
        name: _own
        for name, line in table()["deepspeed"].items()
        if name.startswith("zero_optimization.") and (line.key or "").startswith(OWN)
    },
    **{name: _aio for name in table()["deepspeed"] if name.startswith("aio.") and "*" not in name},
    **{f"zero_optimization.{prefix}prefetch_bucket_size": _prefetch for prefix in ("stage3_", "")},
    "zero_optimization.contiguous_gradients": _contiguous,
    "zero_optimization.overlap_comm": _overlap,
    "zero_optimization.zero_hpz_partition_size": _hpz,
    "data_types.grad_accum_dtype": _accumulated,
}
