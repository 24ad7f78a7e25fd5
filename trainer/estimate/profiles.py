"""Profiles on demand: traced once for each architecture, shape and set of versions, and read from disk afterwards.

An estimate needs neither torch nor transformers once its profile is on disk; importing the two costs more than all
its arithmetic. The file name of a profile is the key of its inputs: model fields, shape, dtypes, the versions of both
libraries and the source of every module that shapes the trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from configs import waiting
from configs.by_path import source_of
from configs.choices import DType, EngineName
from configs.errors import PlanError
from configs.schema import Config
from trainer import linear
from trainer.axes import CONTEXT, EXPERTS, PIPELINE, TENSOR
from trainer.axes.pipeline.table import SCHEDULES, default_stages_per_rank, split_layers
from trainer.estimate import family
from trainer.estimate.profile import (
    LAST,
    WHOLE,
    ModelProfile,
    Outline,
    Part,
    from_json,
    part_from_json,
    part_name,
    part_to_json,
)
from trainer.estimate.sources import dependencies
from trainer.estimate.tracing import Tracer
from trainer.plan.devices import Gpu
from trainer.plan.documents import by_mask
from trainer.plan.plan import Plan
from trainer.process.files import replace_text
from trainer.update import ask as ask_update

Made = TypeVar("Made")
NOTHING: dict[str, Any] = {"batches": [0, 0], "lengths": [0, 0], "part": None}
ALONE = {**NOTHING, "tried": False}
"""The place of a family of which one shape was traced alone."""
UNLIKE = {**NOTHING, "tried": True}
"""The place of a family whose neighbouring shapes could not be traced. They are not tried again."""


def get_profile(
    config: Config,
    plan: Plan,
    gpu: Gpu | None,
    *,
    micro_batch_size: int | None = None,
    alone: int | None = None,
    evaluation: bool = False,
) -> ModelProfile:
    """The profile of the plan's micro-batch, from disk or traced now. gpu: whose kernels are assumed; None: the CPU's.
    alone: so many shapes are traced by themselves; the next is traced with those around it (`family`). None: all are.
    evaluation: forwards without a backward.

    Raises NotEstimated for a model that cannot be traced, and what building and dividing a model raise.
    """
    tracer = _tracer(config, plan)
    outline = _outline(config, plan, tracer)
    shape = _shape_fields(config, plan, gpu, micro_batch_size or plan.batch.micro_batch_size)
    shape["backward"] = shape["backward"] and not evaluation
    parts: dict[str, Part] = {}
    layers, stages = outline.anatomy.layers, stage_layers(config, plan, outline)
    for index, owned in enumerate(stages):
        name = part_name(layers[owned.start : owned.stop], stages=len(stages), index=index)
        if name not in parts:
            fields = {**_outline_fields(config, plan), **shape, "part": name}
            trace = partial(tracer.part, kinds=layers, owned=owned, stages=len(stages), index=index)
            parts[name] = _part(config, fields, trace, tracer, alone=alone)
    return ModelProfile(outline=outline, parts=parts)


def get_outline(config: Config, plan: Plan) -> Outline:
    """The parameters of the plan's pieces of the model, counted on its modules, without a trace."""
    return _outline(config, plan, _tracer(config, plan))


def _tracer(config: Config, plan: Plan) -> Tracer:
    return Tracer(config, plan, _key(config, {"layers": linear.traced(config)}))


def _outline(config: Config, plan: Plan, tracer: Tracer) -> Outline:
    key = _key(config, _outline_fields(config, plan))
    return _cached(config, key, read=partial(from_json, Outline), write=asdict, make=tracer.outline)


def stage_layers(config: Config, plan: Plan, outline: Outline) -> list[range]:
    """The layers of each stage, as `axes.pipeline.split` cuts them; one stage of all layers without a pipeline."""
    count = len(outline.anatomy.layers)
    pipeline, pp = config.parallel.pipeline, plan.degree(PIPELINE)
    if pp == 1:
        return [range(count)]
    stages = pp * (pipeline.stages_per_rank or default_stages_per_rank(pipeline.schedule))
    if count < stages:
        raise PlanError(f"parallel.pp={pp}: the model has {count} layers, {stages} stages need as many; use fewer")
    costs = {"layer_costs": outline.layer_costs, "head_cost": outline.head_cost}
    return split_layers(count, stages, split=pipeline.split, **costs)


def _part(
    config: Config,
    fields: dict[str, Any],
    trace: Callable[..., Part],
    tracer: Tracer,
    *,
    alone: int | None,
) -> Part:
    """A part as it is on disk for this shape, as its family has it, or as it is traced now. tracer: knows the model's
    config, for a family that is not there."""
    key, asked = _key(config, fields), (fields["micro_batch_size"], fields["seq_len"])
    alike = _key(config, {**fields, "micro_batch_size": None, "seq_len": None})

    def make() -> Part:
        known = _read(config, alike) or []
        covering = (family.at(one, asked) for one in known if family.covers(one, asked))
        made = next((part for part in covering if part is not None), None)
        if made is not None:
            return made
        made = trace(fields)
        if UNLIKE in known:
            return made
        found = [ALONE]
        if alone is not None and known.count(ALONE) >= alone:
            borders = list(family.limits(tracer.model.config.to_dict()))
            sliced = config.train.chunked_loss or fields[TENSOR][0] > 1 or fields[PIPELINE]
            # More tokens take more slices, and only the part with the loss has them.
            upwards = sliced and fields["part"].startswith((WHOLE, LAST))

            most = family.most_births(made)

            def traced(place: family.Point) -> Part:
                if place == asked:
                    return made
                return trace({**fields, "micro_batch_size": place[0], "seq_len": place[1]}, most=most)

            found = family.families(asked, borders, traced, upwards=upwards)
            if not any(family.covers(one, asked) for one in found):
                found.append(UNLIKE)
        _save(_file(config, alike), {"key": alike, "value": [*known, *found]})
        return made

    return _cached(config, key, read=part_from_json, write=part_to_json, make=make)


def _cached(
    config: Config,
    key: str,
    *,
    read: Callable[[dict[str, Any]], Made],
    write: Callable[[Made], dict[str, Any]],
    make: Callable[[], Made],
) -> Made:
    with suppress(KeyError, TypeError, ValueError):
        if (found := _read(config, key)) is not None:
            return read(found)
    with waiting.on(f"tracing {config.model.preset}"):
        made = make()
    _save(_file(config, key), {"key": key, "value": write(made)})
    return made


def _read(config: Config, key: str) -> Any:
    """What is on disk under a key; None: nothing is."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(_file(config, key).read_text())
        return found["value"] if found["key"] == key else None
    return None


def _file(config: Config, key: str) -> Path:
    return _folder(config) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _folder(config: Config) -> Path:
    return Path(config.data.cache_dir).expanduser() / "memory"


def _save(file: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all. A cache that cannot be written costs time, nothing else."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(values), shared=True)


def _key(config: Config, fields: Mapping[str, Any]) -> str:
    """fields: with what the model itself, the versions and the sources are, all that the cached value depends on."""
    model = config.model
    local = Path(model.path or "").expanduser() / "config.json"
    described = {
        "model": [model.path, model.revision, str(model.attention), model.architecture, model.config],
        **({"target": [model.target, source_of(model.target)]} if model.target else {}),
        "local": local.read_text() if model.path and local.is_file() else None,
        **_surroundings(),
        **fields,
    }
    return json.dumps(described, sort_keys=True, default=str)


@cache
def _surroundings() -> dict[str, Any]:
    """What stays the same while the process lives."""
    source, versions = dependencies()
    return {"versions": versions, "source": source}


def _outline_fields(config: Config, plan: Plan) -> dict[str, Any]:
    parallel = config.parallel
    return {
        PIPELINE: plan.degree(PIPELINE) > 1,
        EXPERTS: plan.degree(EXPERTS),
        TENSOR: [plan.degree(TENSOR), parallel.sequence_parallel, parallel.tensor_plan],
        "layers": linear.traced(config),
    }


def _shape_fields(config: Config, plan: Plan, gpu: Gpu | None, micro_batch_size: int) -> dict[str, Any]:
    schedule, cp = config.parallel.pipeline.schedule, plan.degree(CONTEXT)
    return {
        "micro_batch_size": micro_batch_size,
        "seq_len": plan.batch.seq_len // cp,
        CONTEXT: [cp, str(config.parallel.context_method) if cp > 1 else ""],
        "imbalance": config.estimate.imbalance if plan.degree(EXPERTS) > 1 else None,
        "dtypes": _dtypes(plan),
        "checkpointing": str(config.train.activation_checkpointing),
        "compile": config.train.compile,
        "gpu": gpu is not None,
        "exact_attention": _exact_attention(plan, gpu),
        "chunked_loss": config.train.chunked_loss,
        **({"label_smoothing": True} if config.train.label_smoothing else {}),
        **({"neftune": True} if config.train.neftune_alpha else {}),
        "documents": [config.data.document_mask, by_mask(config)],
        "moe": [str(config.moe.balance), config.moe.z_loss > 0],
        "backward": ask_update(config.optimizer).passes(config).backwards > 0,
        "split_backward": plan.degree(PIPELINE) > 1 and SCHEDULES[schedule].splits_backward,
    }


def _dtypes(plan: Plan) -> tuple[DType, DType | None, DType | None]:
    """Storage of the parameters during the forward, autocast's dtype, what the logits are cast to by the root.

    FSDP2 and DeepSpeed hand the model parameters in param_dtype; one process and DDP cast at each use.
    """
    wide = DType.float64 if plan.param_dtype is DType.float64 else DType.float32
    if plan.engine is EngineName.deepspeed:
        return plan.param_dtype, None, None
    if plan.fully_sharded:
        return plan.param_dtype, None, wide
    return plan.master_dtype, None if plan.param_dtype is plan.master_dtype else plan.param_dtype, None


def _exact_attention(plan: Plan, gpu: Gpu | None) -> bool:
    """Whether torch's attention must do without CUDA's flash kernel, which takes 16 bit only and needs Ampere."""
    wide = plan.param_dtype in (DType.float32, DType.float64)
    return gpu is not None and (wide or gpu.bfloat16_flops is None)
