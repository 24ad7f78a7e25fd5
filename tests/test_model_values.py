"""Impossible values in `model.config.*` or a model folder's config.json cost one line each and exit code 2 at every
entry point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import main as launch
from launch.estimate import main as memory_estimate
from tests.support.harness import run_ranks
from trainer.__main__ import main as trainer

ENTRY_POINTS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "trainer": (trainer, ["dry_run=true"]),
    "launch": (launch, ["dry_run=true"]),
    "estimate": (memory_estimate, ["parallel=ddp", "cluster=8xh100"]),
}
SIZES = {
    "hidden_size=0": "model.config.hidden_size=0: must be 1 or more",
    "vocab_size=0": "model.config.vocab_size=0: must be 1 or more",
    "num_hidden_layers=-1": "model.config.num_hidden_layers=-1: must be 1 or more",
    "num_hidden_layers=1000000000": "model.config.num_hidden_layers=1000000000: must be 10,000 or less",
    "attention_dropout=nan": "model.config.attention_dropout=nan: must be a number",
    "attention_dropout=1.5": "model.config.attention_dropout=1.5: must be 0 or more and less than 1",
    "rms_norm_eps=nan": "model.config.rms_norm_eps=nan: must be a number",
    "num_hidden_layers=2.5": "model.config.num_hidden_layers=2.5: must be a whole number",
    "num_key_value_heads=3": "model.config.num_key_value_heads=3: must divide the 4 attention heads; use a divisor"
    " of 4",
}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_impossible_sizes_are_one_line_each(entry_point: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan finds them without torch, so all three entry points give the same answer, with both problems at once."""
    main, words = ENTRY_POINTS[entry_point]
    for value, line in SIZES.items():
        assert main(["model=tiny", "data=synthetic", "data.seq_len=16", *words, f"model.config.{value}"]) == 2
        assert capsys.readouterr().err.splitlines() == [line]
    assert main(["model=tiny", *words, "model.config.hidden_size=0", "model.config.vocab_size=0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


BUILT = {
    "hidden_act=nosuch": (
        "model=tiny, model.config={'hidden_act': 'nosuch'}, model.attention=auto: there is no 'nosuch'"
    ),
    "rope_parameters=7": "model.config={'rope_parameters': 7}: ",
}
FOLDERS = {"list": [1, 2], "wrong": {"model_type": "llama", "rms_norm_eps": "tiny"}}


def folders(tmp_path: Path) -> list[Path]:
    for name, content in FOLDERS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    return [tmp_path / name for name in FOLDERS]


def test_the_estimate_says_in_a_line_what_the_library_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=synthetic", "data.seq_len=16", *ENTRY_POINTS["estimate"][1], f"data.cache_dir={tmp_path}"]
    cases = {f"model.config.{value}": line for value, line in BUILT.items()}
    cases |= {f"model.path={folder}": f"model.path={folder}: " for folder in folders(tmp_path)}
    sparse = ["model.config.model_type=mixtral", "model.config.num_local_experts=1"]
    assert memory_estimate(["model=tiny", *words, *sparse]) == 2
    assert capsys.readouterr().err.startswith(
        "model.config.num_experts_per_tok=2: a token cannot go to more than the 1"
    )
    for word, line in cases.items():
        assert memory_estimate(["model=tiny", *words, word]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(line)


def exit_codes(runs: list[list[str]]) -> list[int]:
    return [trainer(words) for words in runs]


def test_the_run_refuses_what_the_library_refuses(tmp_path: Path) -> None:
    words = ["model=tiny", "data=synthetic", "data.seq_len=16", "train.steps=1", "parallel=single"]
    cases = [*(f"model.config.{value}" for value in BUILT), *(f"model.path={folder}" for folder in folders(tmp_path))]
    runs = [[*words, f"train.run_dir={tmp_path / str(number)}", word] for number, word in enumerate(cases)]
    assert run_ranks(1, exit_codes, runs)[0] == [2] * len(cases)
