"""Helpers of the tests of `trainer.data`: small corpora, and the data of one rank of a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import Config
from trainer.data import Batch, DataSet
from trainer.data.build import build_data
from trainer.data.cache import Corpus, TokenisedText
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

Row = tuple[int, ...]


def data_of(*overrides: str, ranks: int = 1, data_rank: int = 0, vocab_size: int = 512) -> DataSet:
    """The data of one rank out of `ranks`, on the CPU and without a process group."""
    layout = ["parallel=ddp", "cluster.device=cpu", "data.seq_len=16", "train.micro_batch_size=2"]
    config = loaded((*layout, *overrides))
    plan = make_plan(config, Machine(world_size=ranks))
    return build_data(config, plan, data_rank=data_rank, vocab_size=vocab_size)


@lru_cache
def loaded(overrides: tuple[str, ...]) -> Config:
    """Load a config once. It is immutable, so the ranks of one layout can share it."""
    return load_config(overrides)


def step_rows(data: DataSet, *, steps: int, first_step: int = 0) -> list[list[Row]]:
    """For each step, the rows of all micro-batches. A row is its input ids followed by its labels."""
    batches = islice(data.steps(first_step), steps)
    return [[row for batch in step for row in rows_of(batch)] for step in batches]


def rows_of(batch: Batch) -> list[Row]:
    return [(*inputs, *labels) for inputs, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)]


def rows_of_all_ranks(overrides: Sequence[str], *, ranks: int, steps: int, first_step: int = 0) -> list[list[Row]]:
    """For each step, the sorted rows of all ranks together."""
    per_rank = [
        step_rows(data_of(*overrides, ranks=ranks, data_rank=rank), steps=steps, first_step=first_step)
        for rank in range(ranks)
    ]
    return [sorted(row for rank in per_rank for row in rank[step]) for step in range(steps)]


def words(seed: int, count: int = 12) -> str:
    """A short document. Each seed gives a different one."""
    return " ".join(f"w{(seed * 7919 + i * 104729) % 9973}" for i in range(count)) + f" number {seed}"


def write_jsonl(path: Path, texts: Iterable[str], *, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode()


def documents_in(
    tokens: list[int], *, end: int = 256, decode: Callable[[list[int]], object] = decode_bytes
) -> Iterator[Any]:
    """The documents in a row of tokens. Each must end with EOS."""
    start = 0
    for place, token in enumerate(tokens):
        if token == end:
            yield decode(tokens[start:place])
            start = place + 1
    assert start == len(tokens), "the last document has no EOS"


def corpus_of(*training: Path, validation: tuple[Path, ...] = (), key: str = "text", fraction: float = 0.2) -> Corpus:
    return Corpus(training=training, validation=validation, text_key=key, fraction=fraction)


def documents_of(text: TokenisedText) -> tuple[list[str], list[str]]:
    """Training and validation documents, in order."""
    return list(documents_in(text.training.array().tolist())), list(documents_in(text.validation.array().tolist()))


def write_corpus(folder: Path) -> list[str]:
    """Write a corpus of 100 training documents and ten validation documents. Returns the overrides for it."""
    write_jsonl(folder / "a.jsonl", map(words, range(100)))
    write_jsonl(folder / "b.jsonl", map(words, range(1000, 1010)))
    return [
        "data=files",
        f"data.paths=[{folder}/a.jsonl]",
        f"data.validation_paths=[{folder}/b.jsonl]",
        f"data.cache_dir={folder}/cache",
    ]
