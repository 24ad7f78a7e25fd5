"""A user's own model, data and tracker, given by their paths, work together: train, estimate, export, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cookbook import CookbookError, compose, estimate, plan, train

from launch.generate import main as generate
from tests.support import models_of_users
from trainer.checkpoint.__main__ import main as checkpoint
from trainer.model.build import build_hf_config
from trainer.model.causal import build_causal

USERS = "tests.support"
MODEL = (
    *("model=custom", f"model.target={USERS}.models_of_users.Gated", "model.config.gate=0.25", "parallel=single"),
    *("model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=2"),
    *("model.config.num_attention_heads=2", "model.config.num_key_value_heads=2", "model.config.vocab_size=260"),
)
DATA = ("data=custom", f"data.target={USERS}.data_of_users.Rows", "data.options.count=40", "data.seq_len=16")
TRACKER = ("logging=custom", f"logging.target={USERS}.trackers_of_users.Lines", "logging.options.file=own.txt")
SHORT = (
    *("train.steps=2", "train.global_batch_size=4", "train.eval_samples=4", "cluster.device=cpu", "launcher=python"),
    *("estimate.gate=off", "logging.progress=off", "checkpoint.every=2"),
)


def test_a_run_of_own_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    result = train(compose(*MODEL, *DATA, *TRACKER, *SHORT, f"train.run_dir={run}"))
    assert result.finished and result.summary["loss_last"] < 7
    saved = json.loads((run / "model" / "config.json").read_text())
    assert (saved["architectures"], saved["model_type"], saved["gate"]) == (["Gated"], "gated_llama", 0.25)
    assert "end False" in (run / "own.txt").read_text()
    assert generate([str(run), "ab", "--tokens=2"]) == 0
    assert checkpoint(["export", str(run), str(tmp_path / "exported")]) == 0
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["gate"] == 0.25
    # The model may lie outside a run folder, and other programs may have a config.yaml there too.
    (tmp_path / "config.yaml").write_text("name: of another program\n")
    assert generate([str(tmp_path / "exported"), "ab", "--tokens=2"]) == 0


def test_a_model_of_the_users_own_is_estimated_and_divided(tmp_path: Path) -> None:
    small = (*MODEL, *DATA, "cluster.device=cpu", f"data.cache_dir={tmp_path}", "train.eval_samples=0")
    config = compose(*small)
    # The model has 2 layers of (4 + 1) * 32 * 32 + 3 * 32 * 64 + 2 * 32, an embedding, a head and a norm.
    parameters = 2 * (5 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 2 * 260 * 32 + 32
    states = estimate(config).busiest.components
    assert 0 <= states["parameters"] - 4 * parameters <= 64
    for layout in ("pipeline", "tensor"):
        halved = compose(*small, f"parallel={layout}", "cluster.gpus_per_node=2", "train.gradient_accumulation_steps=2")
        assert estimate(halved).busiest.components["parameters"] < 0.75 * 4 * parameters


def test_classes_with_one_config_class_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes alternate in one process. They also work after a notebook cell has defined them again."""
    for name in ("Gated", "Wider", "Gated"):
        config = compose(*MODEL, f"model.target={USERS}.models_of_users.{name}")
        assert type(build_causal(config)).__name__ == name
    again: Any = type("GatedConfig", (models_of_users.GatedConfig,), {"__module__": models_of_users.__name__})
    monkeypatch.setattr(models_of_users.Gated, "config_class", again)
    assert type(build_hf_config(compose(*MODEL).model)) is again


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.target=Gated"], "model.target=Gated: is no path of a class; give package.module.Class"),
        (["model.target=torch.nn.Linear"], "model.target=torch.nn.Linear: is no subclass of transformers.PreTrainedM"),
        (
            [f"model.target={USERS}.models_of_users.Borrowed"],
            f"model.target={USERS}.models_of_users.Borrowed: its model_type llama is that of transformers.models.llama",
        ),
        (["model=tiny"], f"model.target={USERS}.models_of_users.Gated: is an architecture of its own, and model=tiny"),
        (["model.config.model_type=gpt2"], "model.config.model_type=gpt2: model.target="),
    ],
)
def test_what_is_no_model_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(CookbookError) as raised:
        plan(compose(*MODEL, *words))
    assert [problem for problem in raised.value.problems if problem.startswith(line)], raised.value.problems


def test_a_field_that_the_config_class_has_not_is_refused() -> None:
    with pytest.raises(CookbookError, match=r"model\.config\.gat=1: GatedConfig has no such field"):
        build_hf_config(compose(*MODEL, "model.config.gat=1").model)
