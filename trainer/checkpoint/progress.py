"""state.json: a run's position and identity, and the check that a resuming run has the same identity.

Positions in the data are counted in samples over all ranks, so they mean the same under every layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from configs.errors import CheckpointDamaged, CheckpointMismatch
from configs.schema import Config
from trainer import linear
from trainer.checkpoint.catalog import committed, step_name
from trainer.checkpoint.manifest import STATE, Manifest, check_missing, read_manifest
from trainer.data import DataSet
from trainer.engine import Counters
from trainer.optim import table
from trainer.plan.plan import Plan

# Fields of a Hugging Face config that affect how a model is run or its origin, not its results.
_INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
BEST = "best"
"""Marks a checkpoint with weights in the midst of training: `trainer.optim.protocol.Average`."""
_REMEDY = {
    "model": "give the same model",
    "tokenizer": "give the same tokenizer",
    "data": "give the same data",
    "optimizer": "give the same optimizer",
    "train": "give the same value",
    "tuning": "give the same value",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """step: number of optimizer updates so far.
    samples: global position in the data.
    engine: from `Engine.counters`.
    report: from `Reporter.totals`.
    identity: of the run, key by key.
    layout: of the run.
    origin: settings in another trainer's checkpoint; empty in a run's own (`trainer.checkpoint.foreign`).
    selection: from `Selection.state`.
    data: from `DataSet.mark`."""

    step: int
    samples: int
    engine: Counters
    identity: dict[str, Any]
    layout: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    data: Any = None


def identity(config: Config, hf_config: PretrainedConfig, data: DataSet) -> dict[str, Any]:
    """Everything that must be the same for a run to be continued rather than mixed with another one."""
    return {
        **model_identity(hf_config),
        "tokenizer": _fingerprint(data),
        "data.source": str(config.data.source),
        "data.seq_len": config.data.seq_len,
        "data.shuffle": config.data.shuffle,
        "data.packing": config.data.packing,
        "data.document_mask": config.data.document_mask,
        "data.fingerprint": data.fingerprint,
        **table.identity(config.optimizer),
        "train.seed": config.train.seed,
        **linear.identity(config),
    }


def model_identity(hf_config: PretrainedConfig) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in hf_config.to_dict().items() if key not in _INCIDENTAL}
    return json.loads(json.dumps(model, default=str))


def layout(plan: Plan) -> dict[str, Any]:
    """The settings that a rank's random numbers depend on: the same layout draws the same dropout masks again."""
    return {
        "engine": str(plan.engine),
        "zero_stage": plan.zero_stage,
        "mesh": {axis: size for axis, size in plan.mesh.items() if size > 1},
        "micro_batch_size": plan.batch.micro_batch_size,
        "device": plan.device,
    }


def check_same(saved: Progress, ours: Mapping[str, Any], *, source: Path, global_batch_size: int) -> None:
    """Raises CheckpointMismatch naming each difference that makes this another run."""
    problems = []
    for key in saved.identity.keys() & ours.keys():
        there, here = saved.identity[key], ours[key]
        if there != here:
            why = table.difference(key, there, here)
            problems.append(
                f"{source}: saved with {key}={_short(there)}, this run has {key}={_short(here)}{why};"
                f" {_REMEDY[key.partition('.')[0]]}, or begin another run from its weights: python -m"
                " trainer.checkpoint export, then model.path=... model.weights=pretrained"
            )
    if saved.samples % global_batch_size:
        problems.append(
            f"train.global_batch_size={global_batch_size}: {source} stands at sample {saved.samples}, which is not a"
            " multiple of it; choose a divisor, so that no sample is repeated or left out"
        )
    if problems:
        raise CheckpointMismatch(*sorted(problems))


def to_json(progress: Progress) -> str:
    return json.dumps(asdict(progress), indent=1) + "\n"


def read_progress(folder: Path, manifest: Manifest) -> Progress:
    """The state in a checkpoint. Raises CheckpointDamaged if it is not the output of `to_json`, or of another step."""
    path = folder / STATE
    try:
        content = json.loads(path.read_bytes())
        progress = Progress(**{**content, "engine": Counters(**content["engine"])})
    except OSError as error:
        check_missing(path, error)
        raise CheckpointDamaged(f"{path}: expected the state of a run, found none ({error.strerror})") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path}: expected the state of a run, found {error!r}") from None
    if progress.step != manifest.step:
        raise CheckpointDamaged(f"{path}: expected step {manifest.step}, which the manifest has, found {progress.step}")
    return progress


def find_best(source: Path) -> Path:
    """For RUN_DIR/checkpoints/best, the best checkpoint according to the newest intact one; any other path is
    unchanged. Raises CheckpointMismatch if the run has kept none."""
    if source.name != BEST or source.exists():
        return source
    for folder in reversed(committed(source.parent)):
        with suppress(CheckpointDamaged):
            best = read_progress(folder, read_manifest(folder)).selection.get("best")
            found = source.parent / step_name(best["step"]) if best else None
            if found is not None and found.is_dir():
                return found
            break
    raise CheckpointMismatch(f"{source}: the run has kept no best checkpoint (checkpoint.best=true); give step-N")


def _short(value: object) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def _fingerprint(data: DataSet) -> str:
    """Equal for tokenizers that encode equally."""
    backend = getattr(data.tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(data.tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
