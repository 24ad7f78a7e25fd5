"""A checkpoint as a Hugging Face folder (for adapters: peft's), one tensor at a time, without a GPU, a process group or
the other ranks.

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
from trainer.checkpoint.hub import SHARD_BYTES, export_model
from trainer.checkpoint.manifest import (
    GENERATION,
    STATE,
    TOKENIZER,
    Manifest,
    check_contents,
    check_file_sizes,
    read_manifest,
)
from trainer.checkpoint.progress import find_best, read_progress
from trainer.checkpoint.tensors import TensorReader
from trainer.data.tokenizer import no_tokenizer
from trainer.engine.saved import BUFFER
from trainer.model.custom import introduce_of_run
from trainer.model.fitting import persistent_buffers
from trainer.optim.table import AVERAGE
from trainer.process.disks import readable, refused
from trainer.process.runtime import Runtime

log = logging.getLogger(__name__)


def export(source: Path, target: Path, *, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the model of a checkpoint, or of the newest intact one of a run, to `target`. Returns the checkpoint.

    Raises CheckpointDamaged or CheckpointMismatch if none can be read, EnvironmentProblem if the target exists or
    cannot be written.
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
        _read_buffers(model, folder, manifest)
        file = folder / TOKENIZER / GENERATION
        generation = file.read_bytes() if file.exists() else None
        export_model(parameters, model, tokenizer, target, dtype=dtype, generation=generation, shard_bytes=shard_bytes)
    return folder


def parameters_of(
    checkpoint: Path, model: PreTrainedModel, runtime: Runtime
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Like `Engine.parameters`, with the values of a checkpoint of this run. The model's buffers get theirs. A
    collective. Raises CheckpointDamaged if its files have another length than before."""

    def read() -> Manifest:
        manifest = read_manifest(checkpoint)
        check_file_sizes(checkpoint, manifest)
        return manifest

    manifest = runtime.agree(read)
    _read_buffers(model, checkpoint, manifest)
    for name, value in _parameters(checkpoint, manifest, read_progress(checkpoint, manifest).identity.get(AVERAGE)):
        runtime.max(0)  # the other ranks wait for rank 0 no longer than one tensor takes
        yield name, value if runtime.is_main else None


def _read_buffers(model: PreTrainedModel, folder: Path, manifest: Manifest) -> None:
    saved = TensorReader(folder, manifest)
    for name, buffer in persistent_buffers(model):
        if f"{BUFFER}/{name}" in saved.names():
            buffer.copy_(saved.read(f"{BUFFER}/{name}"))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    files = {file.name for file in folder.iterdir()} - {GENERATION} if folder.is_dir() else ()
    return AutoTokenizer.from_pretrained(folder) if files else no_tokenizer()


def _not_written(target: Path, why: str) -> EnvironmentProblem:
    shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
    return EnvironmentProblem(f"{target}: cannot be written ({why}); make room there, or choose another folder")


def newest_whole(source: Path, *, newest: bool = False) -> tuple[Path, Manifest]:
    """The checkpoint `source`, or the newest one below it with all bytes correct. newest: the newest of all must be
    correct. Raises CheckpointDamaged, CheckpointMismatch, or EnvironmentProblem if one cannot be read."""
    source = find_best(source)
    candidates = committed(source / CHECKPOINTS) or committed(source)
    with readable(source / STATE):
        alone = (source / STATE).is_file()
    if not candidates and not alone:
        raise CheckpointMismatch(
            f"{source}: is no checkpoint and holds none; give RUN_DIR or RUN_DIR/{CHECKPOINTS}/step-N"
        )
    problems: tuple[str, ...] = ()
    for folder in reversed(candidates or [source]):
        for problem in problems:  # of the previous one, which another replaces now
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
    """The trained model, without memory: the config is in the checkpoint."""
    prefix = "model."
    fields = {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        introduce_of_run(folder)
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
