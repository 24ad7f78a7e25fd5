"""The entry points keep their contract under random configurations: exit code 0, 1, 2, 3 or 75, one line per problem,
no traceback, no changes on disk. The schema yields overrides and YAML files with valid, wrong and odd values."""

from __future__ import annotations

import io
import os
from contextlib import chdir, redirect_stderr, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.keys import plain_kind, schema_keys
from configs.load import group_options
from launch.__main__ import main as launch
from launch.estimate import main as memory_estimate
from trainer.__main__ import main as trainer

ENTRY_POINTS = {"launch": launch, "trainer": trainer, "memory-estimate": memory_estimate}
PLANNED = ("launch", "trainer")
SETTINGS = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# The tests use no network, start nothing, and estimate the memory of a small model only.
LAST = ["dry_run=true", "estimate.gate=off"]
SMALL = ["model=tiny", "estimate.search=false", "estimate.suggest=false", "estimate.plot=null", "estimate.explore=null"]

ODD = [
    *[
        "",
        " ",
        "null",
        "true",
        "yes",
        "0",
        "-1",
        "2",
        "1e5",
        "0123",
        "12:00:00",
        "nan",
        "inf",
        "1e999",
        "9" * 30,
        "???",
    ],
    *["[]", "[1,2]", "[a,[b]]", "{}", "{a: 1}", "[", "'", "'a b'", "\\", "/", "~", ".", "..", "a,b", "é", "\U0001f600"],
    *["x" * 5000, "a=b", "${", "${oc.env:NOT_SET}", "${oc.env:PATH}", "${train.steps}", "${train}", "${no.key}"],
    *["${foo:bar}", "${now:%H}", "interval(0,1)", "range(1,3)", "glob(*)", "\n", "\t", "\x00", "\udcff", "-", "--x"],
    *["[" * 200, "9" * 5000, "/proc/self/mem", "/dev/null", "*", "cpu", "h100", "none"],
]


def right(kind: Any) -> st.SearchStrategy[str]:
    """Draws a valid value of the type, as a user types it."""
    if get_origin(kind) in (list, dict):
        inner = right(get_args(kind)[-1])
        lists = st.lists(inner, max_size=3).map(lambda values: f"[{','.join(values)}]")
        return lists if get_origin(kind) is list else inner.map(lambda value: f"{{a: {value}}}")
    if kind is bool:
        return st.sampled_from(["true", "false"])
    if kind is int:
        return st.sampled_from(["0", "1", "2", "3", "4", "8", "64"])
    if kind is float:
        return st.sampled_from(["0", "0.5", "1", "1e-3", "40"])
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return st.sampled_from([str(choice) for choice in kind])
    return st.sampled_from(["a", "runs/x", "1f1b", "tiny.txt", "4"])


def values(key: str) -> st.SearchStrategy[str]:
    return st.one_of(right(plain_kind(key)), right(plain_kind(key)), st.sampled_from(ODD))


KEYS = [key for key in schema_keys() if key not in ("dry_run", "estimate.gate")]
SET_KEYS = st.sampled_from(KEYS).flatmap(lambda key: values(key).map(lambda value: f"{key}={value}"))
CHOSEN = st.one_of(
    *[st.sampled_from([f"{group}={option}" for option in options]) for group, options in group_options().items()]
)
WRONG_KEYS = st.sampled_from(
    ["train.learning_rate=1", "model=nope", "x", "=", "+a=1", "~train", "a.b=1", "\n=1", "@=1"]
)
WORDS = st.lists(st.one_of(SET_KEYS, SET_KEYS, CHOSEN, CHOSEN, WRONG_KEYS), min_size=1, max_size=6)


def folder_contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def environment() -> dict[str, str]:
    """Returns the environment variables without the one that torch's compiler sets at import."""
    return {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}


def hold_the_contract(entry_point: str, words: list[str], folder: Path) -> None:
    said, errors, before = io.StringIO(), io.StringIO(), folder_contents(folder)
    environ = environment()
    with chdir(folder), redirect_stdout(said), redirect_stderr(errors):
        code = ENTRY_POINTS[entry_point]([*words, *LAST, *(SMALL if entry_point not in PLANNED else ())])
    problems = errors.getvalue().splitlines()
    assert code in (0, 1, 2, 3, 75), (words, code)
    assert (code == 0) == (not problems), (words, problems)
    assert "Traceback" not in errors.getvalue(), (words, errors.getvalue())
    assert len(set(problems)) == len(problems) and all(line.strip() and line.isprintable() for line in problems), (
        problems
    )
    assert code != 2 or not said.getvalue(), (words, said.getvalue())
    assert folder_contents(folder) == before
    assert environment() == environ


@pytest.mark.parametrize("entry_point", PLANNED)
@SETTINGS
@given(words=WORDS)
def test_overrides(entry_point: str, tmp_path: Path, words: list[str]) -> None:
    hold_the_contract(entry_point, words, tmp_path)


@pytest.mark.nightly
@settings(SETTINGS, max_examples=20)
@given(words=WORDS)
def test_overrides_of_an_estimate(tmp_path: Path, words: list[str]) -> None:
    hold_the_contract("memory-estimate", words, tmp_path)


def tree(group: str) -> st.SearchStrategy[str]:
    """Draws the text of a file of the group. Its keys have valid and odd values, dumped as YAML or written verbatim."""
    keys = [key for key in schema_keys() if key.startswith(f"{group}.")]
    pairs = st.sampled_from(keys).flatmap(lambda key: values(key).map(lambda value: (key, value)))

    def text(drawn: list[tuple[str, str]]) -> str:
        nested: dict[str, Any] = {}
        for key, value in drawn:
            *sections, last = key.split(".")[1:]
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return yaml.safe_dump(nested)

    def plain(drawn: list[tuple[str, str]]) -> str:
        return "".join(f"{key.split('.')[1]}: {value}\n" for key, value in drawn if key.count(".") == 1)

    return st.lists(pairs, max_size=4).flatmap(lambda drawn: st.sampled_from([text(drawn), plain(drawn)]))


TROUBLE = st.sampled_from([
    "", "- a\n", "a", "a: [", "a: b: c", "? [a]\n: 1", "{}: 1", "&a [*a]", "a: &a {b: *a}", "a: *none", "\t", "a: !x 1",
    "defaults: [mine]", "defaults: 3", "defaults: [nope]", "defaults: [{a: 1}]", "defaults: [_self_, _self_]",
    "defaults: [override /model: nope]", "# @package\n", "# @package nowhere\na: 1\n", "# @package _global_\n", "\x01",
    "---\na: 1\n---\nb: 1\n", "<<: 3", "<<: {}", "1: 2", "null: 1", "a: 1\na: 2", "hydra: {run: {dir: x}}", "[" * 3000,
])  # fmt: skip


@SETTINGS
@given(data=st.data())
def test_files_of_the_user(tmp_path: Path, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from(sorted(set(group_options()) - {"experiment"})))
    text = data.draw(st.one_of(tree(group), tree(group), TROUBLE))
    name = data.draw(st.sampled_from([group, "experiment"]))
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "mine.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    entry_point = data.draw(st.sampled_from(PLANNED))
    hold_the_contract(entry_point, [f"--config-dir={tmp_path}", f"{name}=mine"], tmp_path)
