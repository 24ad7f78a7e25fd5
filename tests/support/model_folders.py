"""Small model folders, intact and damaged, and the entry point that must refuse damaged ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

WORDS = [
    "data=synthetic",
    "data.tokenizer=bytes",
    "data.seq_len=16",
    "train.steps=1",
    "train.eval_samples=4",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "optimizer=sgd",
    "estimate.gate=off",
    "model.weights=pretrained",
]
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}


def save_llama(folder: Path, *, seed: int = 0, **fields: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**FIELDS, **fields}))
    save(model, folder)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def set_fields(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shards(folder: Path, count: int = 2) -> dict[str, str]:
    """Split the only weight file into several with an index. Returns the index's map from tensor names to files."""
    tensors = tensors_of(folder)
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        held = names[number::count]
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def float8(tensor: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to float8 codes with one scale for each square block."""
    rows, columns = tensor.shape
    blocks = tensor.reshape(rows // block, block, columns // block, block)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(rows, columns), scale


def unpacked(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    block = codes.shape[0] // scale.shape[0]
    return codes.float() * scale.repeat_interleave(block, 0).repeat_interleave(block, 1)


def run_all(runs: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Do the runs one after another in this process. Returns exit code and stderr of each.

    Either all of them reach a step, or none does.
    """
    from trainer.__main__ import main

    results = []
    for words in runs:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main([*WORDS, *words])
        results.append((code, said.getvalue()))
    return results


def config_of(folder: Path) -> PretrainedConfig:
    return LlamaConfig.from_pretrained(folder)
