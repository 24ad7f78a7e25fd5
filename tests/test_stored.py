"""Training starts from the stored weights: a folder that lacks something the model needs is refused before anything is
built, with one line for each problem."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.model_folders import float8, rewrite, run_all, save_llama, set_fields, shards, tensors_of

Damage = Callable[[Path], object]
Q, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = tensors_of(folder)
        change(held)
        rewrite(folder, held)

    return damage


def renamed(name: Callable[[str], str]) -> Damage:
    return lambda folder: rewrite(folder, {name(key): value for key, value in tensors_of(folder).items()})


def overwritten(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def divided(then: Damage) -> Damage:
    return lambda folder: (shards(folder), then(folder))


def pointing(weight_map: object) -> Damage:
    return divided(overwritten(INDEX, json.dumps(weight_map).encode()))


def packed(held: dict[str, torch.Tensor]) -> None:
    held[Q], held[f"{Q}_scale_inv"] = float8(held[Q], 16)


def quantized(method: str) -> Damage:
    return lambda folder: set_fields(folder, quantization_config={"quant_method": method})


REFUSED: dict[str, tuple[Damage | None, list[str], list[str]]] = {
    # name: damage, further overrides, part of each line
    "no head": (tensors(lambda t: t.pop(HEAD)), [], [f"{SINGLE} lacks {HEAD}; ", "model.missing_weights=random"]),
    "no head, adapters": (tensors(lambda t: t.pop(HEAD)), ["tuning=lora", "optimizer=adamw"], [f"lacks {HEAD}; "]),
    "a layer too few": (
        None,
        ["model.config.num_hidden_layers=3"],
        ["layers.2", "and 6 more", "take model.config.num"],
    ),
    "a layer too many": (lambda f: set_fields(f, num_hidden_layers=1), [], ["layers.1", "does not have", "and 6 more"]),
    "unknown": (
        tensors(lambda t: t.update({"q.bias": torch.zeros(3)})),
        [],
        ["holds q.bias, which the model does not"],
    ),
    "a bias": (
        tensors(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)})),
        [],
        ["holds model.layers.1.self_attn.q_proj.bias, which"],
    ),
    "wrapped": (renamed(lambda n: f"base_model.model.{n}"), [], ["begin with base_model.model. (base_model.model.lm"]),
    "sizes": (
        None,
        ["model.config.intermediate_size=64"],
        ["gate_proj.weight and 1 more of shape [48, 32], the model"],
    ),
    "more tokens": (None, ["model.config.vocab_size=270"], ["set model.resize_vocabulary=true"]),
    "fewer tokens": (None, ["model.config.vocab_size=258", "model.resize_vocabulary=true"], ["[260, 32], the model"]),
    "integers": (tensors(lambda t: t.update({HEAD: t[HEAD].int()})), [], [f"holds {HEAD} as I32"]),
    "codes alone": (tensors(lambda t: t.update({HEAD: t[HEAD].char()})), [], [f"holds {HEAD} as I8, codes without"]),
    "float8 alone": (tensors(lambda t: (packed(t), t.pop(f"{Q}_scale_inv"))), [], [f"holds {Q} as F8_E4M3, codes"]),
    "float8, a scale lost": (
        lambda f: (tensors(lambda t: (packed(t), t.pop(f"{Q}_scale_inv")))(f), quantized("fp8")(f)),
        [],
        [f"without {Q}_scale_inv"],
    ),
    "another format": (quantized("gptq"), [], ["quantized as gptq (quantization_config in config.json)"]),
    "tied and different": (lambda f: set_fields(f, tie_word_embeddings=True), [], ["tie_word_embeddings=false"]),
    "empty": (overwritten(SINGLE, b""), [], [f"{SINGLE} is empty"]),
    "truncated": (lambda f: os.truncate(f / SINGLE, 9000), [], [f"{SINGLE} is damaged (incomplete metadata"]),
    "header truncated": (lambda f: os.truncate(f / SINGLE, 90), [], [f"{SINGLE} is truncated (90 bytes)"]),
    "pointer": (overwritten(SINGLE, b"version https://git-lfs.github.com/spec/v1\n"), [], ["is a Git LFS pointer"]),
    "web page": (overwritten(SINGLE, b"\n<!DOCTYPE html><html>"), [], ["is a web page"]),
    "a pickle under its name": (overwritten(SINGLE, b"PK\3\4" + b"\0" * 99), [], ["is a pickle of torch.save"]),
    "a folder": (lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()), [], [f"{SINGLE} is no file"]),
    "a pipe": (lambda f: ((f / SINGLE).unlink(), os.mkfifo(f / SINGLE)), [], [f"{SINGLE} is no file"]),
    "pickles": (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), [], ["pytorch_model.bin can run code"]),
    "nothing": (lambda f: (f / SINGLE).unlink(), [], [f"has neither {SINGLE} nor {INDEX}"]),
    "a shard lost": (
        divided(lambda f: (f / "model-00002-of-00002.safetensors").unlink()),
        [],
        ["model-00002-of-00002.safetensors is not there; copy the folder again"],
    ),
    "shards of two saves": (
        divided(lambda f: shutil.copy(f / "model-00001-of-00002.safetensors", f / "model-00002-of-00002.safetensors")),
        [],
        ["model-00002-of-00002.safetensors does not hold model.embed_tokens.weight, ", f"which {INDEX} promises"],
    ),
    "index: outside": (pointing({"weight_map": {HEAD: "../x.safetensors"}}), [], ["names ../x.safetensors outside of"]),
    "index: a list": (pointing([1]), [], [f'{INDEX} has no "weight_map"']),
    "index: no files": (pointing({"weight_map": {HEAD: 3}}), [], [f'{INDEX} has no "weight_map"']),
    "index: no JSON": (divided(overwritten(INDEX, b"{")), [], [f"{INDEX} is not JSON"]),
    "config: a list": (overwritten("config.json", b"[1]"), [], ["config.json holds a list"]),
    "config: no JSON": (overwritten("config.json", b"<html>"), [], ["config.json is not JSON", "it is a web page"]),
    "config: none": (lambda f: (f / "config.json").unlink(), [], ["has no config.json"]),
    "config: a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), [], ["is no file"]),
    "an adapter": (
        lambda f: (
            shutil.rmtree(f),
            f.mkdir(),
            (f / "adapter_config.json").write_text('{"base_model_name_or_path": "B"}'),
        ),
        [],
        ["adapter_model.safetensors cannot be read (No such file"],
    ),
    "no such folder": (shutil.rmtree, [], ["no such folder"]),
    "attention": (None, ["model.attention=flash_attention_2"], ["model.attention=flash_attention_2"]),
}
TAKEN: dict[str, tuple[Damage | None, list[str]]] = {
    "whole": (None, []),
    "shards": (divided(lambda f: None), []),
    "old tables": (tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})), []),
    "a wrapper's prefix": (renamed(lambda n: f"module.{n}"), []),
    "compiled layers": (renamed(lambda n: n.replace("self_attn", "_orig_mod.self_attn")), []),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """Return exit code and lines for every folder above; all runs share one process."""
    place = tmp_path_factory.mktemp("models")
    names, runs = [], []
    for name, (damage, words, *_) in {**REFUSED, **TAKEN}.items():
        folder = place / str(len(names))
        save_llama(folder)
        if damage is not None:
            damage(folder)
        names.append(name)
        runs.append([f"model.path={folder}", f"train.run_dir={place}/run-{len(names)}", "train.export=false", *words])
    found = run_ranks(1, run_all, runs, timeout=300)[0]
    return {name: (code, said.splitlines()) for name, (code, said) in zip(names, found, strict=True)}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_does_not_hold_the_model_is_refused(answers: dict[str, tuple[int, list[str]]], name: str) -> None:
    code, lines = answers[name]
    assert code == 2, lines
    assert lines and all(line.startswith("model.") for line in lines), lines
    for text in REFUSED[name][2]:
        assert any(text in line for line in lines), lines
    assert len(lines) <= 3, "one line for each problem"


@pytest.mark.parametrize("name", TAKEN)
def test_names_that_mean_the_same_are_read(answers: dict[str, tuple[int, list[str]]], name: str) -> None:
    code, lines = answers[name]
    assert (code, lines) == (0, [])


def damage_by_chance(folder: Path, seed: int) -> None:
    """Damage weights and index in one to three ways, with random names and bytes."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        shards(folder, draw.choice([2, 3]))
    for _ in range(draw.randint(1, 3)):
        files = sorted(path for path in folder.iterdir() if path.name != "config.json")
        if not files:
            return
        path = draw.choice(files)
        content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        match draw.randrange(8):
            case 0:
                path.write_bytes(content[: draw.randrange(len(content) + 1)])
            case 1 | 2 if content:
                for _ in range(draw.randint(1, 8)):
                    content[draw.randrange(min(len(content), draw.choice([8, 200, 3000, 10**9])))] = draw.randrange(256)
                path.write_bytes(content)
            case 3:
                path.unlink()
            case 4:
                path.rename(folder / draw.choice([INDEX, SINGLE, "model-00001-of-00002.safetensors", "x.bin"]))
            case 5:
                path.unlink()
                path.symlink_to(draw.choice(["nowhere", ".", "/dev/null", path.name]))
            case 6:
                old = draw.choice([b"weight", b"model.layers.0", b"F32", b"proj", b"[32,32]", b"safetensors"])
                path.write_bytes(content.replace(old, bytes(draw.sample(old, len(old))), draw.choice([1, -1])))
            case _:
                path.write_bytes(draw.randbytes(draw.choice([0, 7, 8, 9, 100])))


def state_of(folder: Path) -> dict[str, str]:
    return {
        str(path): os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def test_damage_by_chance_ends_in_one_line(tmp_path: Path) -> None:
    folders = [tmp_path / "models" / str(seed) for seed in range(18)]
    whole = tmp_path / "whole"
    save_llama(whole)
    for seed, folder in enumerate(folders):
        shutil.copytree(whole, folder)
        damage_by_chance(folder, seed)
    before = state_of(tmp_path)
    runs = [[f"model.path={f}", f"train.run_dir={tmp_path}/runs/{f.name}", "train.export=false"] for f in folders]
    refused = 0
    for folder, (code, said) in zip(folders, run_ranks(1, run_all, runs, timeout=300)[0], strict=True):
        seed = f"seed {folder.name}: {said}"
        # Exit code 0: only bytes of a value changed; 1: they made the loss non-finite.
        assert code in (0, 1, 2), seed
        assert "Traceback" not in said, seed
        lines = said.splitlines()
        if code == 2:
            refused += 1
            assert 0 < len(lines) <= 6 and all(line.startswith(f"model.path={folder}: ") for line in lines), seed
    assert refused > 12
    after = state_of(tmp_path)
    assert {path: state for path, state in after.items() if f"{tmp_path}/runs" not in path} == before
