"""Data settings of axolotl's and LLaMA-Factory's files: formats of conversations, several data sets as a mixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from configs.foreign import Fate
from configs.imports.combine import import_files
from tests.support.imported import experiment_of, names, written

CONVERSATIONS = {
    "sharegpt": (
        {
            "path": "chats.json",
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["human", "customer"], "assistant": ["gpt"], "system": ["system"]},
            "roles_to_train": ["assistant", "tool"],
            "train_on_eos": "turn",
        },
        {
            "data.paths": ["chats.json"],
            "data.messages_key": "conversations",
            "data.roles": {"human": "user", "customer": "user", "gpt": "assistant"},
            "data.train_roles": ["assistant", "tool"],
        },
        set(),
    ),
    "names": (
        {
            "path": "chats.jsonl.gz",
            "type": "chat_template",
            "message_field_role": "who",
            "message_property_mappings": {"content": "text"},
            "field_tools": "functions",
            "train_on_eos": "last",
        },
        {
            "data.paths": ["chats.jsonl.gz"],
            "data.fields": {"role": "who", "content": "text", "tools": "functions"},
        },
        {"datasets[0].train_on_eos"},
    ),
    "alpaca": ({"path": "a.csv", "type": "alpaca"}, {"data.paths": ["a.csv"]}, set()),
    "files": (
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "chat_template"},
        {"data.paths": ["a.jsonl", "b.jsonl"]},
        set(),
    ),
    "custom": (
        {"path": "a.json", "type": {"field_instruction": "question", "field_output": "answer"}},
        {"data.paths": ["a.json"], "data.fields": {"instruction": "question", "output": "answer"}},
        set(),
    ),
    "a prompt of its own": (
        {"path": "a.json", "type": {"field_instruction": "q", "field_output": "output", "format": "Q: {instruction}"}},
        {"data.paths": ["a.json"]},
        {"datasets[0].type"},
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_of_axolotl(tmp_path: Path, name: str) -> None:
    dataset, expected, lost = CONVERSATIONS[name]
    files = written(tmp_path, run_yaml={"base_model": "a/b", "max_steps": 2, "datasets": [dataset]})
    made = import_files(files)
    found = {key: value for key, value in experiment_of(made, tmp_path).items() if key.startswith("data.")}
    assert {**found, "data.seq_len": 0} == {"data.source": "chat", **expected, "data.seq_len": 0}
    assert {each for each in names(made, Fate.lost) if each.startswith("datasets")} == lost


def test_the_data_sets_of_llama_factory(tmp_path: Path) -> None:
    columns = {"messages": "turns", "tools": "functions"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "model"}
    described = {
        "mine": {"file_name": "mine.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "more": {"file_name": "more.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "alpaca": {
            "file_name": "alpaca.json",
            "columns": {"prompt": "instruction", "query": "context", "response": "r"},
        },
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "far": {"hf_hub_url": "somebody/far", "subset": "big", "formatting": "sharegpt", "columns": columns},
        "some": {
            "file_name": "some.json",
            "formatting": "sharegpt",
            "num_samples": 9,
            "tags": {"system_tag": "rules", "function_tag": "call"},
        },
    }
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(described))
    run = {"model_name_or_path": "a/b", "stage": "sft", "max_steps": 2, "dataset_dir": "sets", "template": "qwen"}

    def data(**more: object) -> dict[str, object]:
        made = import_files(written(tmp_path, run_yaml={**run, **more}))
        found = experiment_of(made, tmp_path)
        return {key: value for key, value in found.items() if key.startswith("data.") and key != "data.seq_len"}

    assert data(dataset="mine, more", train_on_prompt=True) == {
        "data.source": "chat",
        "data.paths": [str(tmp_path / "sets" / "mine.json"), str(tmp_path / "sets" / "more.json")],
        "data.messages_key": "turns",
        "data.fields": {"tools": "functions"},
        "data.roles": {"model": "assistant"},
        "data.train_roles": ["system", "user", "assistant", "tool"],
    }
    assert data(dataset="alpaca")["data.fields"] == {"input": "context", "output": "r"}
    assert data(dataset="far").items() >= {"data.name": "somebody/far", "data.subset": "big"}.items()
    assert data(dataset="far, mine")["data.mixture"]["far"]["name"] == "somebody/far"  # pyright: ignore
    assert not {"data.paths", "data.source"} & data(dataset="pairs").keys()
    assert not {"data.paths", "data.source"} & data(dataset="alpaca,mine").keys()
    assert data(dataset="some")["data.roles"] == {"rules": "system"}
    made = import_files(written(tmp_path, run_yaml={**run, "dataset": "some"}))
    assert {"some.num_samples", "some.tags.function_tag"} < names(made, Fate.lost)


def test_several_data_sets_become_a_mixture(tmp_path: Path) -> None:
    """axolotl shuffles its data sets together; LLaMA-Factory does too, or interleaves them by probabilities."""
    sets = [
        {"path": "a/chats.jsonl", "type": "chat_template", "field_messages": "talk"},
        {"path": "b/chats.jsonl", "type": "chat_template"},
        {"path": "books.txt", "type": "completion"},
    ]
    made = import_files(written(tmp_path, run_yaml=yaml.safe_dump({"base_model": "x", "datasets": sets})))
    mixture = {
        "chats": {"source": "chat", "paths": ["a/chats.jsonl"], "messages_key": "talk"},
        "chats-2": {"source": "chat", "paths": ["b/chats.jsonl"]},
        "books": {"source": "files", "paths": ["books.txt"]},
    }
    assert experiment_of(made, tmp_path)["data.mixture"] == mixture
    alike = {"base_model": "x", "datasets": [{**sets[1], "path": f"{name}.jsonl"} for name in "ab"]}
    made = import_files(written(tmp_path, run_yaml=yaml.safe_dump(alike)))
    assert made.settings["data.paths"] == ["a.jsonl", "b.jsonl"]
    assert "data.mixture" not in made.settings
    (tmp_path / "data").mkdir()
    known = {"a": {"file_name": "a.json"}, "b": {"file_name": "b.jsonl"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(known))
    factory = {"model_name_or_path": "x", "stage": "sft", "dataset": "a, b", "dataset_dir": "data"}
    factory |= {"mix_strategy": "interleave_under", "interleave_probs": "0.7, 0.3"}
    made = import_files(written(tmp_path, run_yaml=yaml.safe_dump(factory)))
    assert {name: source["weight"] for name, source in made.settings["data.mixture"].items()} == {"a": 0.7, "b": 0.3}
    assert made.settings["data.exhausted"] == "stop"
