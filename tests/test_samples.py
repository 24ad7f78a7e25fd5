"""`train.samples`: the text generated after a validation is the same under every layout, and sampling does not affect
training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.errors import ConfigError
from configs.load import load_config
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from tests.support.refusals import assert_refused
from tests.support.selection import rows
from trainer.data.tokenizer import build_byte_tokenizer
from trainer.report.metrics import SampleMetrics, numbers
from trainer.report.terminal import render
from trainer.run.sampling import _given, chances  # pyright: ignore[reportPrivateUsage]

TINY = ["model=tiny", "data=builtin", "data.seq_len=128", "cluster.device=cpu", "precision=fp64", "estimate.gate=off"]
TINY += ["model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.intermediate_size=64"]
TINY += [
    "train.steps=2",
    "train.eval_samples=2",
    "train.global_batch_size=4",
    "optimizer.lr=0.02",
    "checkpoint.every=0",
]
SAMPLES = ["train.samples.prompts=[def,'import o']", "train.samples.from_validation=2", "train.samples.tokens=6"]
WRITES = [*TINY, *SAMPLES, "train.export=false", "checkpoint.final=false"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ddp": (2, []),
    "fsdp": (2, ["train.chunked_loss=true"]),
    "tensor": (2, ["parallel.sequence_parallel=true", "train.chunked_loss=true"]),
    "pipeline": (2, []),
    "context": (2, []),
    "3d": (8, []),
}


def alone(folder: str) -> list[int]:
    silent = [*TINY, "parallel=single", f"train.run_dir={folder}/silent"]
    drawn = [*WRITES, "parallel=single", "train.samples.temperature=0.9", f"train.run_dir={folder}/drawn"]
    return [
        run_trainer(silent),
        run_trainer([*TINY, *SAMPLES, "parallel=single", f"train.run_dir={folder}/single"]),
        run_trainer(drawn),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the runs `silent`, `single` and `drawn` of one process."""
    folder = tmp_path_factory.mktemp("samples")
    assert run_ranks(1, alone, str(folder)) == [[0, 0, 0]]
    return folder


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def test_the_training_is_the_same_to_the_bit_with_samples_and_without(runs: Path) -> None:
    for other in ("single", "drawn"):
        for kind, key in (("step", "loss"), ("step", "grad_norm"), ("validation", "validation_loss")):
            assert [line[key] for line in lines(runs / "silent", kind)] == [
                line[key] for line in lines(runs / other, kind)
            ]
    assert not lines(runs / "silent", "sample")
    assert [line["text"] for line in lines(runs / "drawn", "sample")] != [
        line["text"] for line in lines(runs / "single", "sample")
    ]


def test_a_greedy_sample_is_what_transformers_writes(runs: Path) -> None:
    """The last samples are compared, since the run exports their model."""
    found = lines(runs / "single", "sample")
    assert [(line["step"], line["number"]) for line in found] == [(step, n) for step in (0, 2) for n in (1, 2, 3, 4)]
    tokenizer: Any = build_byte_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(runs / "single" / "model", dtype=torch.float64)
    for line in found[4:]:
        ids = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        assert ids.shape[1] == (32 if line["number"] > 2 else len(line["prompt"]))
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert line["text"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_text_ends_as_the_file_of_the_models_generation_says(runs: Path, tmp_path: Path) -> None:
    """A chat model's end-of-turn token may be only in generation_config.json."""
    model = shutil.copytree(runs / "single" / "model", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(512))}))
    small = [word for word in TINY if not word.startswith("model")]
    start = [f"model.path={model}", "model.weights=pretrained", "parallel=single", f"train.run_dir={tmp_path / 'run'}"]
    words = [*small, *start, "train.steps=1", "train.export=false", "checkpoint.final=false"]
    assert run_trainer([*words, "train.samples.prompts=[def]", "train.samples.tokens=6"]) == 0
    assert [(line["text"], line["ended"]) for line in lines(tmp_path / "run", "sample")] == [("", True)] * 2


@pytest.mark.parametrize("layout", rows([(name,) for name in LAYOUTS], lambda name: name not in ("3d", "ddp")))
def test_every_layout_writes_the_same(layout: str, runs: Path, tmp_path: Path) -> None:
    ranks, more = LAYOUTS[layout]
    drawn = ["train.samples.temperature=0.9"] if layout == "context" else []
    words = [*WRITES, *more, *drawn, f"parallel={layout}", f"train.run_dir={tmp_path / 'run'}"]
    assert run_ranks(ranks, run_trainer, words) == [0] * ranks
    assert lines(tmp_path / "run", "sample") == lines(runs / ("drawn" if drawn else "single"), "sample")


@pytest.mark.parametrize("layout", rows([("zero1",), ("zero2",), ("zero3",)], lambda name: name == "zero3"))
def test_zero_writes_what_its_model_says(layout: str, tmp_path: Path) -> None:
    words = [*TINY, *SAMPLES, f"parallel={layout}", "precision=fp32", f"train.run_dir={tmp_path / 'run'}"]
    assert run_ranks(2, run_trainer, words) == [0, 0]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([[*b"import o"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    found = next(line for line in lines(tmp_path / "run", "sample") if (line["step"], line["number"]) == (2, 2))
    assert found["text"] == build_byte_tokenizer().decode(made[0, 8:], skip_special_tokens=True)


def test_a_sample_is_one_line_that_no_terminal_obeys() -> None:
    line = SampleMetrics(step=3, number=2, prompt="x" * 70 + "\x1b[2J", text="a\nb\x9b\x07", ended=False)
    assert (
        render(line, 9)
        == f"step 3/9  sample 2  prompt ...{'x' * 56!r}".rstrip("'") + r"\x1b[2J'  text 'a\nb\x9b\x07'..."
    )
    assert numbers(line) == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.samples.prompts=[a]", "train.eval_samples=0"], "train.samples.prompts=['a']: are written after a val"),
        (
            ["train.samples.from_validation=1", "data=synthetic"],
            "train.samples.from_validation=1: data=synthetic is no",
        ),
        (
            ["train.samples.from_validation=9", "train.eval_samples=8"],
            "train.samples.from_validation=9: train.eval_sam",
        ),
        (["train.samples.tokens=9"], "train.samples.tokens=9: there is nothing to go on from"),
        (["train.samples.temperature=1"], "train.samples.temperature=1.0: there is nothing to go on from"),
        (["train.samples.prompts=[a]", "data.seq_len=64"], "train.samples.tokens=64: prompt and text are one sequence"),
    ],
)
def test_what_refuses_them(words: list[str], line: str) -> None:
    assert_refused(words, line)


def test_a_prompt_without_room_ends_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = f"train.samples.prompts=[a,{'b' * 124}]"
    words = [*TINY, prompts, "train.samples.tokens=6", "parallel=single", f"train.run_dir={tmp_path / 'run'}"]
    assert run_trainer(words) == 2
    assert (
        "train.samples.prompts: number 2 has 124 tokens, which leaves no room for train.samples.tokens=6 in data"
        in capsys.readouterr().err
    )


def test_a_template_that_fails_on_a_prompt_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length < 2 %}{{ raise_exception('alone') }}{% endif %}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    talk = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "four"}]
    for name in ("chats", "validation"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 40)
    words = [*TINY, "data=chat", f"data.paths=[{tmp_path}/chats.jsonl]", f"data.tokenizer={tmp_path}/tokenizer"]
    words += [f"data.validation_paths=[{tmp_path}/validation.jsonl]", f"data.cache_dir={tmp_path}", "parallel=single"]
    words += [f"train.run_dir={tmp_path}/run", "train.samples.prompts=[three]", "train.samples.tokens=6"]
    assert run_trainer(words) == 2
    said = capsys.readouterr().err
    assert "train.samples.prompts: number 1: the chat template fails on one message of the user (TemplateError" in said
    assert "Traceback" not in said


def test_a_prompt_begins_as_the_texts_of_all_sources_do(tmp_path: Path) -> None:
    """Each source of a mixture may set its own `bos`."""
    tokenizer = build_byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    source = {"weight": 1, "source": "builtin"}

    def first(*bos: str) -> list[int]:
        sources = {f"{number}": {**source, "bos": each} for number, each in enumerate(bos)}
        config = load_config([*TINY, *SAMPLES])
        return next(_given(replace(config, data=replace(config.data, mixture=sources)), tokenizer)).ids

    assert first("always", "always") == [tokenizer.eos_token_id, *b"def"]
    assert first("never", "never") == [*b"def"]
    with pytest.raises(ConfigError, match=r"data\.mixture\.0: data\.bos=always and data\.mixture\.1: data\.bos=never"):
        first("always", "never")


@pytest.mark.parametrize("heat", [1e-308, 5e-324, 1e-3])
def test_the_coldest_temperature_takes_the_likeliest(heat: float) -> None:
    scores = torch.tensor([[1.0, 300.0, 299.0, -torch.inf]], dtype=torch.float64)
    assert chances(scores, heat).tolist() == [[0, 1, 0, 0]]
