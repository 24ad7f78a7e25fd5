"""A checkpoint as a Hugging Face folder (of adapters: peft's), one tensor at a time, without a GPU, a process group or
the rest of the ranks.

python -m trainer.checkpoint export RUN_DIR OUT                  the newest whole checkpoint of a run
python -m trainer.checkpoint export RUN_DIR/checkpoints/step-00000100 OUT --dtype bfloat16
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from configs.errors import CheckpointDamaged, CheckpointMismatch, EnvironmentProblem
from trainer import linear
from trainer.checkpoint.catalog import CHECKPOINTS, committed
from trainer.checkpoint.hub import export_model
from trainer.checkpoint.manifest import (
    GENERATION,
    STATE,
    TOKENIZER,
    Manifest,
    check_contents,
    check_file_sizes,
    read_manifest,
)
from trainer.checkpoint.progress import AVERAGE, read_progress
from trainer.checkpoint.tensors import TensorReader
from trainer.data.tokenizer import no_tokenizer
from trainer.engine.saved import BUFFER
from trainer.model.fitting import persistent_buffers
from trainer.process.disks import readable, refused

log = logging.getLogger(__name__)


def export(source: Path, target: Path, *, dtype: torch.dtype) -> Path:
    """Write the model of a checkpoint, or of the newest whole one of a run, to `target`. Returns the checkpoint.

    Raises CheckpointDamaged or CheckpointMismatch when there is none that can be read, EnvironmentProblem when the
    target exists or cannot be written.
    """
    with readable(target):
        exists = target.exists()
    if exists:
        raise EnvironmentProblem(f"{target}: exists; choose another folder")
    folder, manifest = newest_whole(source)
    known = read_progress(folder, manifest).identity
    tokenizer, parameters = _tokenizer(folder / TOKENIZER), _parameters(folder, manifest, known.get(AVERAGE))
    model = _build_model(folder, known)
    with refused(target, lambda why: _not_written(target, why)):
        linear.restore(model, known)
        saved = TensorReader(folder, manifest)
        for name, buffer in persistent_buffers(model):
            if f"{BUFFER}/{name}" in saved.names():
                buffer.copy_(saved.read(f"{BUFFER}/{name}"))
        file = folder / TOKENIZER / GENERATION
        generation = file.read_bytes() if file.exists() else None
        export_model(parameters, model, tokenizer, target, dtype=dtype, generation=generation)
    return folder


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder) if folder.is_dir() and any(folder.iterdir()) else no_tokenizer()


def _not_written(target: Path, why: str) -> EnvironmentProblem:
    shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
    return EnvironmentProblem(f"{target}: cannot be written ({why}); make room there, or choose another folder")


def newest_whole(source: Path, *, newest: bool = False) -> tuple[Path, Manifest]:
    """The checkpoint that `source` is, or the newest one below it whose every byte is right. newest: the newest of all
    must be. Raises CheckpointDamaged, CheckpointMismatch, or EnvironmentProblem where one cannot be read."""
    candidates = committed(source / CHECKPOINTS) or committed(source)
    with readable(source / STATE):
        alone = (source / STATE).is_file()
    if not candidates and not alone:
        raise CheckpointMismatch(
            f"{source}: is no checkpoint and holds none; give RUN_DIR or RUN_DIR/{CHECKPOINTS}/step-N"
        )
    problems: tuple[str, ...] = ()
    for folder in reversed(candidates or [source]):
        for problem in problems:  # of the one before, now that another is looked at in its place
            log.warning(problem)
        try:
            manifest = read_manifest(folder)
            check_file_sizes(folder, manifest)
            check_contents(folder, manifest, manifest.files)
            read_progress(folder, manifest)
        except CheckpointDamaged as damage:
            problems = damage.problems
            continue
        if newest and folder != (candidates or [source])[-1]:
            raise CheckpointDamaged(f"{source}: its newest checkpoint is damaged; the newest whole one is {folder}")
        return folder, manifest
    raise CheckpointDamaged(*problems, f"{source}: holds no checkpoint that is whole")


def _parameters(
    folder: Path, manifest: Manifest, average: tuple[str, float] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """average: kind and part of `trainer.optim.protocol.Average`."""
    saved = TensorReader(folder, manifest)
    for key in saved.names():
        kind, _, name = key.partition("/")
        if kind in ("model", "frozen"):
            value = saved.read(key)
            if average is not None and f"{average[0]}/{name}" in saved:
                value = value.lerp(saved.read(f"{average[0]}/{name}"), average[1])
            yield name, value


def _build_model(folder: Path, known: Mapping[str, Any]) -> PreTrainedModel:
    """The model that was trained, without memory: the config is in the checkpoint. Its code is transformers' own."""
    prefix = "model."
    fields = {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise CheckpointMismatch(
            f"{folder}: holds a model of type {kind}, which this version of transformers does not know"
        )
    config = CONFIG_MAPPING[kind](**fields)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # Not part of the identity; without it other programs cannot tell which class reads the exported folder.
    model.config.architectures = [type(model).__name__]
    return model
