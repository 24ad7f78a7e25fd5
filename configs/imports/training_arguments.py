"""transformers' TrainingArguments as JSON, YAML or training_args.bin, with a script's model and data arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from configs.foreign import Fate, look_up, table
from configs.imports import sharding
from configs.imports.fields import Field, Handler, Source, Unreadable, by_entry, translate

NAME = "TrainingArguments"
SECTIONS = ("training_arguments",)
LONGEST = 100_000 * 60
INTERNAL = {
    "distributed_state": "it is the state of a process",
    "deepspeed_plugin": "deepspeed says it",
    "hf_deepspeed_config": "deepspeed says it",
    "fsdp_plugin_args": "fsdp_config says it",
    "xla_fsdp_config": "it is for TPUs",
    "mixed_precision": "bf16 and fp16 say it",
}


def recognise(tree: Mapping[str, Any]) -> bool:
    known = sum(look_up("training_arguments", str(name)) is not None for name in tree)
    return known >= 1 and known * 2 >= len(tree)


def fields(source: Source, problems: list[str]) -> Iterator[Field]:
    internal = {name: _internal for name in source.tree if name.startswith("_") or name in INTERNAL}
    yield from translate(source, SPECIAL | internal, problems)
    yield from layout(source)


def layout(source: Source) -> Iterator[Field]:
    """Without fsdp and deepspeed the Trainer replicates the model."""
    if not source.get("fsdp") and not source.get("deepspeed"):
        default = source.translated("(no fsdp, no deepspeed)", "", {"parallel.dp_replicate": None}, "DDP, if several")
        default.given = False
        yield default


def files_named(source: Source) -> Iterator[tuple[str, Any]]:
    if isinstance(source.get("deepspeed"), str) and source.get("deepspeed"):
        yield "deepspeed", source.get("deepspeed")


def _internal(source: Source, name: str, value: Any) -> Field:
    return source.harmless(name, value, INTERNAL.get(name, "it is the state of a process"))


def _max_steps(source: Source, name: str, value: Any) -> Field | None:
    if isinstance(value, int) and value <= 0:
        return source.harmless(name, value, "num_train_epochs counts")
    return None


def epochs(source: Source, name: str, value: Any) -> Field:
    """They depend on what other files and the command line say about the data."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        return _bad("must be a number greater than 0")
    steps = source.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        return source.harmless(name, value, "max_steps counts")
    return source.translated(name, value, {"~epochs": float(value)})


def warmup(source: Source, name: str, value: Any) -> Field | None:
    """A number of steps, or below 1 a share of all steps."""
    if value is None or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        return None if value is None else _bad("must be a number, 0 or more")
    if source.get("lr_scheduler_type") == "constant":
        return source.harmless(name, value, "lr_scheduler_type=constant never warms up")
    if name == "warmup_ratio" and source.get("warmup_steps"):
        return source.harmless(name, value, "warmup_steps counts")
    if name == "warmup_ratio" or 0 < value < 1:
        note = "their first step has a learning rate of 0, ours 1 / warmup_steps of the peak"
        return source.translated(name, value, {"~warmup_ratio": float(value)} if value else {}, note)
    if value == 0 and source.get("warmup_ratio"):
        return source.harmless(name, value, "warmup_ratio counts")
    return None


def _bad(rule: str) -> Field:
    raise Unreadable(rule)


def _min_lr(source: Source, name: str, value: Any) -> Field:
    peak = source.get("learning_rate", 5e-5)
    if not isinstance(value, (int, float)) or not isinstance(peak, (int, float)) or peak <= 0:
        raise Unreadable("must be a number, a part of learning_rate")
    return source.translated(name, value, {"scheduler.min_lr_ratio": value / peak}, f"a part of learning_rate={peak}")


def optimizer(source: Source, name: str, value: Any) -> Field | None:
    if not str(value).startswith("paged_"):
        return None
    line = next(found for section in source.sections if (found := look_up(section, name)) is not None)
    found = by_entry(source, line, name, value)
    if source.get("deepspeed") or "deepspeed" in source.together:
        why = "DeepSpeed's partitions are not paged; parallel=zero2_offload keeps the states in host memory"
    elif "offload" in str(source.get("fsdp")):
        why = "offload keeps the states in host memory for good"
    else:
        return found
    found.settings = {key: here for key, here in found.settings.items() if key != "optimizer.paged"}
    found.why = why
    return found


def _report_to(source: Source, name: str, value: Any) -> Field:
    trackers = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    trackers = [each for each in trackers if each not in ("none", "None", "[]")]
    if not trackers:
        return source.harmless(name, value, "no tracker, as here")
    if trackers[0] == "all":
        return source.lost(name, value, "one tracker is used: logging.tracker names it")
    why = f"one tracker is used; {', '.join(trackers[1:])} would get nothing" if trackers[1:] else ""
    return source.translated(name, value, {"logging.tracker": trackers[0]}, why)


def interval(source: Source, name: str, value: Any) -> Field:
    """eval_strategy, save_strategy, and their older names."""
    text = str(value).lower()
    save = name == "save_strategy"
    if text == "no" or value is False:
        return source.translated(name, value, {"checkpoint.every": 0} if save else {"train.eval_every": 0})
    if text == "steps":
        return source.harmless(
            name, value, f"{'checkpoint' if save else 'train.eval'}{'.every' if save else '_every'} counts steps too"
        )
    every = "checkpoint.every" if save else "train.eval_every"
    if save and text == "best":
        return _of_validations(source, name, value, {"checkpoint.best": True, "checkpoint.every": 0})
    if text == "epoch":
        return source.lost(name, value, f"it is counted in steps: give {every}=N")
    raise Unreadable("choose no, steps, epoch" + ", best" * save)


def _of_validations(source: Source, name: str, value: Any, settings: Mapping[str, Any]) -> Field:
    """Settings that compare validations, whose interval here is counted in steps."""
    strategy = str(source.get("eval_strategy", source.get("evaluation_strategy", "no"))).lower().rpartition(".")[2]
    if strategy == "steps" or (strategy == "no" and source.get("eval_steps")):
        why = "RUN_DIR/model holds the best one" if "checkpoint.best" in settings else ""
        return source.translated(name, value, dict(settings), why)
    more = " ".join(f"{key}={str(each).lower()}" for key, each in settings.items())
    return source.lost(name, value, f"it needs validations, which are counted in steps: give train.eval_every=N {more}")


def best(source: Source, name: str, value: Any) -> Field | None:
    return _of_validations(source, name, value, {"checkpoint.best": True}) if value in (True, "true", "True") else None


def patience(source: Source, name: str, value: Any) -> Field | None:
    counted = isinstance(value, int) and value > 0
    return _of_validations(source, name, value, {"train.patience": value}) if counted else None


def steps(source: Source, name: str, value: Any) -> Field | None:
    """eval_steps, save_steps, logging_steps: below 1 a share of all steps; read only if the strategy is steps."""
    strategy = {"eval_steps": "eval_strategy", "save_steps": "save_strategy", "logging_steps": "logging_strategy"}[name]
    default = "no" if name == "eval_steps" else "steps"
    chosen = str(source.get(strategy, source.get("evaluation_strategy", default) if name == "eval_steps" else default))
    if value is None or chosen.lower() not in ("steps", "intervalstrategy.steps"):
        return source.harmless(name, value, f"{strategy}={chosen}")
    if isinstance(value, float) and 0 < value < 1:
        key = {"eval_steps": "train.eval_every", "save_steps": "checkpoint.every", "logging_steps": "logging.every"}[
            name
        ]
        return source.lost(name, value, f"a part of all steps is no number of them: give {key}=N")
    return None


def _eval_strategy(source: Source, name: str, value: Any) -> Field:
    found = interval(source, name, value)
    if str(value).lower() == "steps" and source.get("eval_steps") is None:
        every = source.get("logging_steps", 500)
        if isinstance(every, float) and 0 < every < 1:
            return source.lost(name, value, "a part of all steps is no number of them: give train.eval_every=N")
        return source.translated(name, value, {"train.eval_every": int(every)}, "eval_steps is logging_steps")
    return found


def fsdp(source: Source, name: str, value: Any) -> Field:
    items = value if isinstance(value, list) else str(value).split() if isinstance(value, str) else [value]
    items = [str(each).lower() for each in items if each not in (None, "", False, "False", "false")]
    if not items:
        return source.harmless(name, value, "as here")
    settings: dict[str, Any] = {"parallel.dp_shard": None}
    why, fate = "", Fate.translated
    for item in items:
        if item == "offload":
            settings |= {"parallel.offload.optimizer": "cpu", "parallel.offload.parameters": "cpu"}
        elif item not in ("auto_wrap", "true"):
            found = sharding.strategy(source, name, item, None)
            settings |= found.settings
            why, fate = found.why, found.fate
    made = source.translated(name, value, settings, why)
    made.fate = fate
    return made


def fsdp_config(source: Source, name: str, value: Any) -> list[Field] | Field:
    """A dictionary, whose names the table lists under accelerate."""
    if isinstance(value, str) and value:
        return source.lost(name, value, "that file's values are not read; write them into fsdp_config itself")
    if not isinstance(value, Mapping) or not value:
        return source.harmless(name, value, "it is not set")
    made: list[Field] = []
    on = bool(source.get("fsdp"))
    for key, each in value.items():
        full, short = f"{name}.{key}", str(key).removeprefix("fsdp_")
        if not on or short.startswith("xla") or short == "version":
            why = (
                "fsdp is off"
                if not on
                else "it is for TPUs"
                if short.startswith("xla")
                else "FSDP2 does what version 1 did"
            )
            made.append(source.harmless(full, each, why))
        elif short == "reshard_after_forward":
            made.append(sharding.reshard(source, full, each, None))
        elif short == "cpu_offload":
            made.append(by_entry(source, table()["accelerate"]["fsdp_config.fsdp_offload_params"], full, each))
        elif (line := look_up("accelerate", f"fsdp_config.fsdp_{short}")) is not None:
            made.append(by_entry(source, line, full, each))
        elif short in ("limit_all_gathers", "sync_module_states", "min_num_params"):
            made.append(source.harmless(full, each, "FSDP2 bounds its gathers by itself"))
        else:
            made.append(
                Field(file=source.name, name=full, value=each, fate=Fate.unknown, why="no version of it is known here")
            )
    return made


def deepspeed(source: Source, name: str, value: Any) -> Field:
    if not value:
        return source.harmless(name, value, "as here")
    if isinstance(value, Mapping):
        return source.harmless(name, "{...}", "it is read as a file of DeepSpeed's")
    if "deepspeed" in source.together:
        return source.harmless(name, value, "that file is read as well")
    return source.lost(name, value, "that file is not here; give it too, else the model is replicated (DDP)")


def _resume(source: Source, name: str, value: Any) -> Field:
    if value in (None, False, "", "None"):
        return source.harmless(name, value, "it is not set")
    folder = str(source.get("output_dir") or "") if value in (True, "True", "true") else str(value)
    if not folder:
        return source.lost(name, value, "which checkpoint is not said; give train.resume=FOLDER")
    return source.translated(name, value, {"train.resume": folder}, "a checkpoint of theirs is converted")


def _data_seed(source: Source, name: str, value: Any) -> Field | None:
    return source.harmless(name, value, "it is the seed") if value == source.get("seed", 42) else None


def _timeout(source: Source, name: str, value: Any) -> Field | None:
    if isinstance(value, (int, float)) and value > LONGEST:
        return source.translated(name, value, {"train.timeout_minutes": LONGEST / 60}, "the longest that is taken")
    return None


def _remote_code(source: Source, name: str, value: Any) -> Field | None:
    if str(value).lower() != "true" or source.get("model_revision") or source.get("revision_of_model"):
        return None
    why = "no code of a model's folder runs; where it must, give model.trust_remote_code=true model.revision=COMMIT"
    return source.lost(name, value, why)


SPECIAL: dict[str, Handler] = {
    "max_steps": _max_steps,
    "num_train_epochs": epochs,
    "warmup_steps": warmup,
    "warmup_ratio": warmup,
    "lr_scheduler_kwargs.min_lr": _min_lr,
    "optim": optimizer,
    "report_to": _report_to,
    "eval_strategy": _eval_strategy,
    "evaluation_strategy": _eval_strategy,
    "save_strategy": interval,
    "load_best_model_at_end": best,
    "eval_steps": steps,
    "save_steps": steps,
    "logging_steps": steps,
    "fsdp": fsdp,
    "fsdp_config": fsdp_config,
    "deepspeed": deepspeed,
    "resume_from_checkpoint": _resume,
    "data_seed": _data_seed,
    "ddp_timeout": _timeout,
    "trust_remote_code": _remote_code,
}
