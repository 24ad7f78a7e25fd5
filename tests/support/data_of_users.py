"""User-defined data sets for tests of `data.target`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset


class Rows:
    """Map-style data. Sample n holds the 4 to 17 tokens n, n + 1, ..."""

    def __init__(self, count: int, vocab_size: int, first: int = 0) -> None:
        self.count, self.vocab_size, self.first = count, vocab_size, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = [(self.first + number + place) % self.vocab_size for place in range(4 + number % 14)]
        return {"input_ids": ids}


class Tensors(Rows):
    """Samples of tensors, as a tokenizer and a collator of transformers return them."""

    fingerprint = "mine"
    asked = 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = torch.arange(8) + number
        labels = torch.where(ids % 2 == 0, ids, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(8) < 5).long()}

    def validation(self) -> Rows:
        Tensors.asked += 1
        return Rows(5, self.vocab_size, first=100)


class Endless:
    """A stream of `count` samples. The class counts all samples made."""

    made = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            Endless.made += 1
            yield {"input_ids": [number, number + 1, number + 2]}


class Measured(IterableDataset[Any]):
    """An IterableDataset of torch with a length, as progress bars want it."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(Endless(3))


class Placed(Endless):
    """The same stream with a position that can be saved and restored."""

    place = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.place < self.count:
            Endless.made += 1
            self.place += 1
            yield {"input_ids": [self.place - 1, self.place, self.place + 1]}
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Half(Endless):
    def state_dict(self) -> dict[str, Any]:
        return {}


class Wrong(Rows):
    """Each sample breaks another rule."""

    def __getitem__(self, number: int) -> Any:
        return [
            [1, 2, 3],
            {"input_ids": [1, 2], "labels": [1, 2], "weight": 1},
            {"input_ids": [[1, 2]]},
            {"input_ids": [1.5, 2.0]},
            {"input_ids": [1]},
            {"input_ids": list(range(20))},
            {"input_ids": [1, 2, 3], "labels": [1, 2]},
            {"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]},
            {"input_ids": [1, 700]},
            {"input_ids": [1, 2], "labels": [1, -1]},
        ][number]


class Late(Rows):
    """Sample 1 raises. The samples checked before a run are valid."""

    def __getitem__(self, number: int) -> Any:
        return {}[number] if number == 1 else super().__getitem__(number)


class Neither:
    pass
