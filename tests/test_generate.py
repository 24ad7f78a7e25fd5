"""`cookbook generate` writes text with a run, its checkpoint, its adapter and its initial weights."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launch.cookbook import main as cookbook
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from trainer.data.tokenizer import build_byte_tokenizer

TRAIN = ["model=tiny", "data=builtin", "data.seq_len=64", "parallel=single", "launcher=python", "estimate.gate=off"]
TRAIN += [
    "train.steps=2",
    "train.eval_samples=0",
    "optimizer.lr=0.01",
    "cluster.device=cpu",
    "model.config.num_hidden_layers=1",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates the run folders `whole` (a model) and `lora`, `adapter` and `prompt` (three adapters of that model)."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(1, run_trainer, [*TRAIN, f"train.run_dir={folder / 'whole'}"])
    words = [word for word in TRAIN if not word.startswith("model")]
    words += [f"model.path={folder / 'whole' / 'model'}", "model.weights=pretrained"]
    for method in ("lora", "adapter", "prompt"):
        run_ranks(1, run_trainer, [*words, f"tuning={method}", f"train.run_dir={folder / method}"])
    return folder


def written(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cookbook(["generate", *words]) == 0
    return capsys.readouterr().out


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    """Returns the text that transformers generates."""
    tokenizer = build_byte_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0]))


def test_a_run_and_its_checkpoint_write_what_transformers_writes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(runs / "whole" / "model", "def é", 12)
    options = ("--tokens", "12", "--temperature", "0")
    assert written(capsys, str(runs / "whole"), "def é", *options) == expected + "\n"
    shutil.copytree(runs / "whole" / "checkpoints", tmp_path / "checkpoints")
    assert written(capsys, str(tmp_path), "def é", *options) == expected + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("def é"))
    assert written(capsys, str(runs / "whole" / "model"), "-", *options) == expected + "\n"


def test_a_seed_gives_one_text_and_the_first_weights_another(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = written(capsys, str(runs / "whole"), "--tokens", "30", "--seed", "3")
    assert first == written(capsys, str(runs / "whole"), "--tokens", "30", "--seed", "3")
    assert first != written(capsys, str(runs / "whole"), "--tokens", "30", "--seed", "4")
    untrained = written(capsys, str(runs / "whole"), "--tokens", "30", "--seed", "3", "--initial")
    assert untrained != first
    assert not set(map(ord, untrained)) & {*range(10), *range(11, 32), 127} - {9}, "a terminal would obey it"


@pytest.mark.parametrize("method", ["lora", "adapter", "prompt"])
def test_an_adapter_writes_with_its_model(method: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("def", "--tokens", "8", "--temperature", "0")
    assert written(capsys, str(runs / method), *options).startswith("def")
    base = str(runs / "whole" / "model")
    assert written(capsys, str(runs / method / "model"), *options, "--base", base).startswith("def")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["absent", "--tokens", "0", "--temperature", "1e-308", "--top-p", "2"],
            ["--tokens=0: must", "--temperature=1e-308: must", "--top-p=2.0: must", "absent: no such folder"],
        ),
        (["RUN", "--chat", "hello"], ["--chat: the tokenizer of RUN has no chat template"]),
        (["RUN", "x" * 3000], ["prompt: has 3000 tokens, and the model of RUN takes"]),
        (["RUN/model", "--initial"], ["RUN/model: --initial needs the folder of a run"]),
        (["RUN/logs"], ["RUN/logs: is no checkpoint"]),
        (["RUN", "--device", "tpu9"], ["--device=tpu9: "]),
        (["BARE", "x"], ["BARE: cannot turn text into tokens (it holds no tokenizer)"]),
    ],
)
def test_what_cannot_write_is_one_line(
    words: list[str], says: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, run = tmp_path / "bare", runs / "whole"
    shutil.copytree(run / "model", bare, ignore=shutil.ignore_patterns("*token*"))
    named = [word.replace("RUN", str(run)).replace("BARE", str(bare)) for word in words]
    assert cookbook(["generate", *named]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert not printed.out and len(lines) == len(says), printed
    for line, said in zip(lines, says, strict=True):
        assert said.replace("RUN", str(run)).replace("BARE", str(bare)) in line


def test_a_template_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=260, **sizes)).save_pretrained(tmp_path)
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()  # discards the progress bar of save_pretrained
    assert cookbook(["generate", str(tmp_path), "hello", "--chat"]) == 2
    assert capsys.readouterr().err == (
        f"--chat: the chat template of {tmp_path} fails on a user's message (no users here); mend it, or leave --chat"
        " out\n"
    )
