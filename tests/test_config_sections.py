"""Configurations composed from prebuilt sections equal Hydra's, and each caller gets its own copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import sections
from configs.load import by_hydra, load_config
from tests.support.selection import rows

OPTIONS = {group: options for group, options in sections.own_options().items() if group != "experiment"}
KEYS = [
    "train.steps='7'",
    "optimizer.lr=1",
    "dry_run=true",
    "profile_steps=[1,2]",
    "++optimizer.options.a.b=1",
    "++optimizer.options={c: [x]}",
    "logging.project=${optimizer.lr}",
]


@pytest.mark.parametrize("number", rows(((each,) for each in range(max(map(len, OPTIONS.values())))), lambda n: n == 1))
def test_sections_are_what_hydra_composes(number: int) -> None:
    """Row n takes the n-th option of each group, so the rows together cover all options."""
    words = [f"{group}={options[number % len(options)]}" for group, options in OPTIONS.items()] + KEYS
    found, expected = sections.composed(words), by_hydra(words, [])
    assert found is not None
    assert repr(found[0]) == repr(expected[0])
    assert list(found[1].items()) == list(expected[1].items())


def test_an_experiment_is_left_to_hydra() -> None:
    assert sections.composed(["experiment=demo"]) is None


def test_no_experiment_takes_an_earlier_one_back(tmp_path: Path) -> None:
    """The same holds with a user's file, which Hydra composes."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("seq_len: 64\n")
    assert load_config(["experiment=demo", "experiment=null"]) == load_config()
    assert load_config(["data=mine", "experiment=null"], config_dir=str(tmp_path)).data.seq_len == 64


def test_two_calls_give_two_configurations() -> None:
    words = ["optimizer.options={a: {b: 1}}", "data.paths=[x]"]
    first, second = load_config(words), load_config(words)
    assert first == second
    first.train.steps += 1
    first.data.paths.append("y")
    first.profile_steps.append(9)
    first.optimizer.options["a"]["b"] = 2
    assert load_config(words) == second != first


@pytest.mark.parametrize("word", ["data=mine", "experiment=mine"])
def test_a_file_of_the_user_is_read_at_every_call(tmp_path: Path, word: str) -> None:
    file = tmp_path / f"{word.replace('=', '/')}.yaml"
    file.parent.mkdir()
    for length in (64, 128):
        file.write_text(f"# @package _global_\ndata: {{seq_len: {length}}}\n")
        assert load_config([word], config_dir=str(tmp_path)).data.seq_len == length


def test_an_environment_that_changes_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        monkeypatch.setenv("NAME_OF_PROJECT", name)
        assert load_config(["logging.project=${oc.env:NAME_OF_PROJECT}"]).logging.project == name
