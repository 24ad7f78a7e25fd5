"""The finished model as a Hugging Face folder, written shard by shard from any layout, with the hub's own names.

The engine passes on one whole parameter at a time; rank 0 holds at most one shard file of them.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from configs.errors import DataError
from configs.schema import Model
from trainer import linear
from trainer.checkpoint.hub_layout import HubLayout
from trainer.checkpoint.manifest import GENERATION
from trainer.model.fitting import persistent_buffers
from trainer.model.stored import local_folder

if TYPE_CHECKING:
    from peft import PeftConfig

SHARD_BYTES = 5 * 10**9


def generation_config(model: Model) -> bytes | None:
    """The unchanged file with end tokens and sampling of a model given by its path; None without one. Raises DataError
    if it cannot be read."""
    if model.path is None:
        return None
    try:
        folder = local_folder(model.path)
        file = folder / GENERATION if folder else _on_the_hub(model)
        return file.read_bytes() if file is not None and file.is_file() else None
    except OSError as error:
        raise DataError(f"model.path={model.path}: {GENERATION} cannot be read ({error.strerror or error})") from None


def _on_the_hub(model: Model) -> Path | None:
    file = cached_file(
        str(model.path),
        GENERATION,
        revision=model.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(file) if file is not None else None


def export_model(
    parameters: Iterable[tuple[str, torch.Tensor | None]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    generation: bytes | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write parameters, config and tokenizer to `folder`, which appears complete or not at all. For a model with
    adapters only the adapters, in peft's format.

    parameters: from `Engine.parameters()`; every rank must call this, the ranks that get None write nothing.
    generation: from `generation_config`. Raises FileExistsError if the folder exists.
    """
    adapters = getattr(model, "peft_config", {})
    if adapters:
        return _export_adapter(parameters, next(iter(adapters.values())), tokenizer, folder, dtype=dtype)
    if folder.exists():
        raise FileExistsError(folder)
    writer: ShardWriter | None = None
    config = _config_for_export(model, dtype)
    layout: HubLayout | None = None
    for name, tensor in parameters:
        if tensor is not None:
            if writer is None or layout is None:
                layout = HubLayout(config)
                writer = ShardWriter(folder.with_name(folder.name + ".partial"), shard_bytes)
            writer.add_all(layout.add(name, tensor.to(dtype)))
    if writer is not None and layout is not None:
        for name, buffer in persistent_buffers(model):
            writer.add_all(layout.add(name, buffer.cpu()))
        writer.add_all(layout.rest())
        writer.close()
        config.save_pretrained(writer.folder)
        if generation is not None:
            (writer.folder / GENERATION).write_bytes(generation)
        elif model.generation_config is not None:
            model.generation_config.save_pretrained(writer.folder)
        tokenizer.save_pretrained(writer.folder)
        writer.folder.rename(folder)


def _export_adapter(
    parameters: Iterable[tuple[str, torch.Tensor | None]],
    adapters: PeftConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
) -> None:
    """adapters: peft's content of adapter_config.json, with the target modules that it found in the model."""
    if folder.exists():
        raise FileExistsError(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in parameters:
        if tensor is not None:
            tensors[name] = tensor
    if not tensors:
        return
    stored = linear.exported(adapters, tensors)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in stored.items()}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    written = copy.copy(adapters)
    written.inference_mode = True
    for listed in ("target_modules", "target_parameters", "feedforward_modules"):
        if names := getattr(adapters, listed, None):
            setattr(written, listed, sorted(names))
    written.save_pretrained(str(partial))
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


class ShardWriter:
    """Safetensors files of at most `shard_bytes`, with the index that transformers reads."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        held = sum(t.nbytes for t in self.pending.values())
        if self.pending and held + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard, give the files their final names and write the index if there are several."""
        self._flush()
        count, weight_map = len(self.shards), {}
        for number, names in enumerate(self.shards, start=1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard_file(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))

    def _flush(self) -> None:
        if self.pending:
            self.shards.append(list(self.pending))
            save_file(self.pending, self._shard_file(len(self.shards)), metadata={"format": "pt"})
            self.pending = {}

    def _shard_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}"


def _config_for_export(model: PreTrainedModel, dtype: torch.dtype) -> PretrainedConfig:
    config = type(model.config)(**model.config.to_dict())
    config.dtype = dtype
    config.use_cache = True
    return config
