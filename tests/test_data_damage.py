"""Any content of a user's files is trained on, or refused in one line per problem. The files are never changed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.choices import DataSource
from configs.errors import EXIT_BAD_CONFIG, CookbookError, DataError
from tests.support.data_cases import data_of, loaded, words, write_jsonl
from trainer.data import DataSet
from trainer.data.build import build_data
from trainer.data.paths import find_files
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

CASES = 200
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 " * 40}], "id": 1}
ROW = {"text": words(3), "id": 1}
# Unexpected values that a field of a row may have.
SHAPES: list[object] = [None, "", "x", "é中" * 9, 0, -1, 2.5, 1e999, True, [], ["a"], [[]], [None], [{}], {}, {"a": 1}]
SHAPES += [[{"role": "user"}], [{"role": "assistant", "content": "x"}], "\ud800", "\0", "</s>", {"role": "user"}]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Returns the content truncated, overwritten, shifted, or replaced by something else."""
    at, length = draw.randrange(len(content)), draw.choice([1, 8, 200])
    return draw.choice(
        [
            content[:at],
            content[at:],
            content[:at] + draw.randbytes(length) + content[at + length :],
            content[:at] + bytes(length) + content[at + length :],
            content[:at] + content[at + length :],
            draw.randbytes(length * 50),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"<!DOCTYPE html><html></html>" * 20,
            b"",
        ]
    )


def misshapen(row: dict[str, object], draw: random.Random) -> object:
    """Returns the row with one value, at any depth, of another shape, or returns another shape as the row."""
    place: object = json.loads(json.dumps(row))
    changed = place
    while isinstance(place, dict | list) and place:
        key = draw.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        if draw.random() < 0.4 or not isinstance(place[key], dict | list):
            place[key] = draw.choice(SHAPES)
            return changed
        place = place[key]
    return draw.choice(SHAPES)


def write_case(folder: Path, draw: random.Random) -> tuple[DataSource, Path]:
    """Writes a user's file of a random kind, damaged or not. Returns the source that reads it and the path to name."""
    kind = draw.choice(["txt", "jsonl", "parquet", "chat"] * 4 + ["hub"])
    if kind == "parquet":
        file = folder / "a.parquet"
        options = {"compression": draw.choice(["none", "zstd", "snappy"]), "write_page_checksum": draw.random() < 0.5}
        pq.write_table(pa.table({"text": [words(i) for i in range(60)]}), file, **options)
    elif kind == "txt":
        file = folder / "a.txt"
        file.write_text("\n".join(words(i) for i in range(60)))
    else:
        file = folder / ("train.jsonl" if kind == "hub" else "a.jsonl")
        good = CHAT if kind == "chat" else ROW
        rows = [misshapen(good, draw) if draw.random() < 0.04 else good for _ in range(20)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if draw.random() < 0.5:
        file.write_bytes(damaged(file.read_bytes(), draw))
    if kind == "hub":
        return DataSource.hub, folder
    return (DataSource.chat if kind == "chat" else DataSource.files), file


def build(source: DataSource, path: Path, cache: Path) -> DataSet:
    """Builds data like `data_of`, but does not compose a configuration for each file."""
    words = (
        "parallel=ddp",
        "cluster.device=cpu",
        "data.seq_len=64",
        "train.eval_samples=1",
        "train.micro_batch_size=2",
    )
    config = copy.deepcopy(loaded(words))
    config.data.source, config.data.cache_dir = source, str(cache)
    config.data.name, config.data.paths = (str(path), []) if source is DataSource.hub else (None, [str(path)])
    return build_data(config, make_plan(config, Machine(world_size=1)), data_rank=0, vocab_size=512)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_damaged_files_are_trained_on_or_refused_in_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    draw, ends = random.Random(11), {"trained": 0, "refused": 0}
    for number in range(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, path = write_case(folder, draw)
        before = {file: hashlib.sha256(file.read_bytes()).digest() for file in folder.iterdir()}
        try:
            data = build(source, path, tmp_path / "cache")
            next(data.steps())
            list(data.validation())
            ends["trained"] += 1
        except CookbookError as error:
            assert error.exit_code == EXIT_BAD_CONFIG, error
            assert error.problems
            assert all(problem and "\n" not in problem and len(problem) < 1000 for problem in error.problems), error
            assert all(problem.startswith(("data.", "rank ")) for problem in error.problems), error
            ends["refused"] += 1
        assert {file: hashlib.sha256(file.read_bytes()).digest() for file in folder.iterdir()} == before
    assert min(ends.values()) > CASES // 10, ends
    assert "".join(capfd.readouterr()) == ""


# Paths that are not files


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "says"), [(pipe, "is a pipe"), (unix_socket, "is a socket"), (dangling, "is a link to")]
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    write_jsonl(tmp_path / "good.jsonl", map(words, range(5)))
    make(tmp_path / "a.jsonl")
    for entry in (tmp_path / "a.jsonl", tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(DataError) as caught:
            find_files([str(entry)], key="data.paths")
        (problem,) = caught.value.problems
        assert problem.startswith(f"data.paths={entry}: {tmp_path}/a.jsonl {says}")
    with pytest.raises(DataError, match=rf"^data\.name={tmp_path}: {tmp_path}/a\.jsonl {says}"):
        data_of("data=hub", f"data.name={tmp_path}")


def test_a_device_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=r"^data\.paths=/dev/zero: /dev/zero is a device, which cannot be read twice"):
        find_files(["/dev/zero"], key="data.paths")


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(DataError, match=r"^data\.paths=a\x00b: (cannot be looked up|no such file)"):
        find_files(["a\0b"], key="data.paths")


def test_folders_that_look_like_files_and_links_to_folders_are_searched(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "folder.jsonl" / "deep" / "a.jsonl", ["a"])
    (tmp_path / "linked").symlink_to(tmp_path / "folder.jsonl")
    (tmp_path / "folder.jsonl" / "deep" / "back").symlink_to(tmp_path)
    expected = [tmp_path / "folder.jsonl" / "deep" / "a.jsonl"]
    assert find_files([str(tmp_path / "folder.jsonl")], key="data.paths") == expected
    assert find_files([str(tmp_path / "linked")], key="data.paths") == expected
    assert find_files([str(tmp_path)], key="data.paths") == expected


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Drops root's privileges for a while, because root can read every file."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, closed = write_jsonl(tmp_path / "a.jsonl", ["a"]), tmp_path / "folder" / "closed"
    closed.mkdir(parents=True)
    for path, mode in ((file, 0), (closed, 0), (closed.parent, 0o755), (tmp_path, 0o755)):
        path.chmod(mode)
    # The names are relative to this folder, because the folders above it may be closed too.
    monkeypatch.chdir(tmp_path)
    with without_privileges(), pytest.raises(DataError) as caught:
        find_files(["a.jsonl", "folder"], key="data.paths")
    assert caught.value.problems == (
        "data.paths=a.jsonl: a.jsonl cannot be read (Permission denied); change its permissions, or leave it out",
        "data.paths=folder: cannot be looked up (Permission denied: folder/closed); name another",
    )
    with (
        without_privileges(),
        pytest.raises(DataError, match=r"^data\.name=\.: \./?a\.jsonl cannot|^data\.name=\.: cannot"),
    ):
        data_of("data=hub", "data.name=.")
    closed.chmod(0o755)
