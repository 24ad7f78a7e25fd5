"""Makes and checks objects of a user's class, and reads them as rows of a batch.

    a sample               input_ids 5 7 8 9          labels -100 -100 8 9             each of its own token
    its row, seq_len 6     input_ids 5 7 8 9 0 0      labels -100 8 9 -100 -100 -100   each of the token before it

A sample has from 2 to seq_len + 1 tokens, the last of which is only a label. Each is checked when it is read: data that
was correct at the start may be wrong at sample 40,000.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from configs.by_path import described
from configs.errors import DataError, first_line
from configs.schema import Config
from trainer.data import IGNORED, Batch
from trainer.data.custom import PLACE, VALIDATION, class_of, is_stream, made_with
from trainer.data.loader import OrderedSamples, Source
from trainer.data.positions import Order, permute
from trainer.data.samples import Samples
from trainer.data.tokenizer import tokenizer_to_export

LOOKED_AT = 16
"""Number of samples that are read before the run."""
HELD_OUT_KEY = 0x0D
END = object()
IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
Row = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything needed to make an object, sent to loader processes instead of the object: each makes its own, since
    open files do not survive in two processes."""

    config: Config
    seq_len: int
    vocab_size: int
    _made: dict[tuple[int, str], Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"data.target={self.config.data.target}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def make(self) -> Any:
        """A new object. Raises DataError."""
        found = class_of(self.config.data)
        given = {
            "tokenizer": tokenizer_to_export(self.config),
            "seq_len": self.seq_len,
            "vocab_size": self.vocab_size,
            "seed": self.config.train.seed,
        }
        return self.asked("cannot be made", lambda: found(**made_with(found, self.config, given)))

    def kept(self) -> Any:
        """The object of this process."""
        return self._once("data", self.make)

    def validation(self) -> Any:
        """The object's `validation()`, called once in this process."""
        return self._once(VALIDATION, lambda: self.asked("validation() fails", getattr(self.kept(), VALIDATION)))

    def _once(self, what: str, make: Callable[[], Any]) -> Any:
        place = os.getpid(), what
        if place not in self._made:
            self._made[place] = make()
        return self._made[place]

    def asked(self, what: str, call: Any) -> Any:
        """Result of the user's code. Raises DataError with its exception."""
        try:
            return call()
        except DataError:
            raise
        except Exception as error:  # anything that foreign code raises
            raise DataError(f"{self.key}: {what} ({described(error)}); mend it") from None

    def row(self, sample: Any, where: str) -> Row:
        """Its tokens and labels, not shifted. Raises DataError for an invalid sample."""
        said = f"{self.key}: {where}"
        if not isinstance(sample, Mapping) or IDS not in sample:
            raise DataError(f"{said} is no mapping with {IDS} ({type(sample).__name__}); give one")
        sample = cast("Mapping[str, Any]", sample)
        if unread := sorted(set(sample) - {IDS, LABELS, MASK}):
            raise DataError(f"{said} has {', '.join(unread)}, which nothing reads; leave it out")
        ids = self._numbers(sample[IDS], IDS, said)
        labels = self._numbers(sample.get(LABELS, ids), LABELS, said)
        mask = self._numbers(sample.get(MASK, np.ones_like(ids)), MASK, said)
        for name, values in ((LABELS, labels), (MASK, mask)):
            if len(values) != len(ids):
                raise DataError(f"{said} has {len(ids)} {IDS} and {len(values)} {name}; give one for each token")
        length = int(mask.sum())
        if not (mask == (np.arange(len(mask)) < length)).all():
            raise DataError(f"{said}: {MASK} must be ones and then zeros; put the padding behind the tokens")
        ids, labels = ids[:length], labels[:length]
        if not 2 <= length <= self.seq_len + 1:
            raise DataError(f"{said} has {length} tokens; give from 2 to data.seq_len + 1 = {self.seq_len + 1}")
        for name, values in ((IDS, ids), (LABELS, labels[labels != IGNORED])):
            if len(values) and not 0 <= values.min() <= values.max() < self.vocab_size:
                raise DataError(
                    f"{said}: {name} has {values.min()} to {values.max()}; give 0 to {self.vocab_size - 1}, the model's"
                    f" vocabulary{f', or {IGNORED}, which is ignored' if name == LABELS else ''}"
                )
        return ids, labels

    @staticmethod
    def _numbers(values: Any, name: str, said: str) -> NDArray[np.int64]:
        try:
            found = np.asarray(values)
        except (TypeError, ValueError, RuntimeError):
            found = np.empty((0, 0))
        if found.ndim != 1 or found.dtype.kind not in "iub":
            raise DataError(f"{said}: {name} must be whole numbers in one dimension; give a list of them")
        return found.astype(np.int64)

    def batch(self, rows: list[Row]) -> Batch:
        ids = np.zeros((len(rows), self.seq_len), np.int64)
        labels = np.full_like(ids, IGNORED)
        lengths = np.empty(len(rows), np.int64)
        for number, (tokens, wanted) in enumerate(rows):
            lengths[number] = filled = min(len(tokens), self.seq_len)
            ids[number, :filled], labels[number, : len(wanted) - 1] = tokens[:filled], wanted[1:]
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), lengths=torch.from_numpy(lengths))


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """`Samples` of an object with a length, in its order: those of its validation (`validating`), or `count` of its own
    `of`, either the held-out ones or all others."""

    recipe: Recipe
    count: int
    of: int
    held_out: bool = False
    validating: bool = False

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        places = numbers
        if self.held_out:
            places = numbers + _held_out(self.of, self.count)[numbers]
        elif self.count < self.of:
            places = numbers + np.searchsorted(_held_out(self.of, self.of - self.count), numbers, side="right")
        found = self.recipe.validation() if self.validating else self.recipe.kept()
        return self.recipe.batch([self._row(found, place) for place in places.tolist()])

    def _row(self, found: Any, place: int) -> Row:
        where = f"{'validation ' if self.validating else ''}sample {place}"
        return self.recipe.row(self.recipe.asked(f"{where} fails", lambda: found[place]), where)


@lru_cache
def _held_out(total: int, count: int) -> NDArray[np.int64]:
    """For each held-out sample, in ascending order, the number of other samples before it."""
    places = np.arange(total - count, total, dtype=np.int64)
    return np.sort(permute(places, count=total, key=HELD_OUT_KEY)) - np.arange(count)


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """`Reading` of an object without a length, endless: at its end it is read from its start again."""

    recipe: Recipe
    in_order: bool = True

    def open(self, mark: Any = None) -> OpenStream:
        return OpenStream(self.recipe, mark)


class OpenStream:
    """A stream from a mark on. Positions must be asked for in order.

    With `state_dict` the object goes to its position itself; without it the samples before are read again.
    """

    def __init__(self, recipe: Recipe, mark: dict[str, Any] | None) -> None:
        self._recipe, self._found = recipe, recipe.make()
        self._keeps = all(hasattr(self._found, name) for name in PLACE)
        self._position = 0  # of the next sample
        if mark is not None and self._keeps:
            self._position = mark["position"]
            recipe.asked("load_state_dict fails", lambda: self._found.load_state_dict(mark["state"]))
        self._mark = mark
        self._samples = self._walk()

    def at(self, positions: NDArray[np.int64]) -> Batch:
        return self._recipe.batch([self._read(position) for position in positions.tolist()])

    def mark(self) -> dict[str, Any] | None:
        """Mark of the sample after the last one."""
        if not self._keeps or not self._position:
            return None
        state = self._recipe.asked("state_dict fails", lambda: self._found.state_dict())
        try:
            return {"position": self._position, "state": json.loads(json.dumps(state))}
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self._recipe.key}: state_dict() gives what JSON cannot hold ({first_line(error)}); give numbers,"
                " texts, lists and dictionaries"
            ) from None

    def _read(self, position: int) -> Row:
        while self._position < position:
            next(self._samples)
            self._position += 1
        found = self._recipe.row(next(self._samples), f"sample {position}")
        self._position += 1
        return found

    def _walk(self) -> Iterator[Any]:
        resumed = self._keeps and self._mark is not None
        while True:
            samples, any_here = self._recipe.asked("__iter__ fails", lambda: iter(self._found)), resumed
            while (sample := self._next(samples)) is not END:
                any_here = True
                yield sample
            if not any_here:
                raise DataError(f"{self._recipe.key}: its stream holds no sample; give some")
            resumed = False  # a position may be at the end, but a whole pass follows

    def _next(self, samples: Iterator[Any]) -> Any:
        return self._recipe.asked(f"sample {self._position} fails", lambda: next(samples, END))


def custom_source(config: Config, *, seq_len: int, vocab_size: int) -> Source:
    """Raises DataError for a class whose objects break the rules, one line for each rule."""
    recipe = Recipe(config=config, seq_len=seq_len, vocab_size=vocab_size)
    stream = is_stream(config.data)
    validation = _validation(recipe)
    if stream:
        reading, count, total = Streamed(recipe=recipe), None, None
        seen = reading.open().at(np.arange(1))
    else:
        total = _length(recipe, recipe.kept(), "")
        held = 0 if hasattr(recipe.kept(), VALIDATION) else _to_hold_out(config, total)
        training = Numbered(recipe=recipe, count=total - held, of=total)
        if validation is None:
            validation = Numbered(recipe=recipe, count=held, of=total, held_out=True)
        order = Order(count=training.count, seed=config.train.seed, shuffle=config.data.shuffle)
        reading, count = OrderedSamples(samples=training, order=order), training.count
        seen = _looked_at(training, validation)
    if validation is None:
        validation = Numbered(recipe=recipe, count=0, of=0)
    data = config.data
    return Source(
        tokenizer=tokenizer_to_export(config),
        reading=reading,
        validation=validation,
        count=count,
        until_exhausted=count,
        fingerprint=_fingerprint(recipe, seen, f"{count} of {total}"),
        text=lambda samples, steps: (
            f"custom: {data.target}, {'a stream' if count is None else f'{count:,} samples'}"
            f"{'' if count is None else f' ({samples / count:.2g} epochs in {steps} steps)'};"
            f" validation {validation.count:,} samples"
        ),
    )


def _validation(recipe: Recipe) -> Numbered | None:
    """Count of the object's own validation; None if it has none, or nothing is validated on."""
    if not recipe.config.train.eval_samples or not hasattr(recipe.kept(), VALIDATION):
        return None
    found = recipe.validation()
    count = _length(recipe, found, "validation(): ")
    return Numbered(recipe=recipe, count=count, of=count, validating=True)


def _to_hold_out(config: Config, total: int) -> int:
    """Samples that are validated on."""
    data, wanted = config.data, bool(config.train.eval_samples)
    held = round(total * data.validation_fraction)
    if wanted and data.validation_fraction and total > 1:
        held = min(max(held, 1), total - 1)
    if wanted and not held:
        raise DataError(
            f"data.target={data.target}: no sample is left for validation (data.validation_fraction="
            f"{data.validation_fraction} of {total}); give more, or a validation(), or set train.eval_samples=0"
        )
    return held if held < total else 0


def _length(recipe: Recipe, found: Any, what: str) -> int:
    count = recipe.asked(f"{what}len() fails", lambda: len(found))
    if not count:
        raise DataError(f"{recipe.key}: {what}has no sample; give some")
    return count


def _looked_at(training: Samples, validation: Samples) -> Batch:
    """Some training samples, spread from the first to the last. Raises DataError with the problems of both."""
    batches: list[Batch] = []
    problems: dict[str, None] = {}
    for each in (training, validation):
        count = each.count or 0
        for number in np.unique(np.linspace(0, max(0, count - 1), LOOKED_AT).astype(np.int64))[:count]:
            try:
                found = each.read(np.array([number]))
            except DataError as error:
                problems |= dict.fromkeys(error.problems)
            else:
                batches += [found] if each is training else []
    if problems:
        raise DataError(*list(problems)[:LOOKED_AT])
    return Batch(torch.cat([batch.input_ids for batch in batches]), torch.cat([batch.labels for batch in batches]))


def _fingerprint(recipe: Recipe, seen: Batch, counts: str) -> str:
    """Fingerprint of the object's own, or of the samples that were read."""
    own = getattr(recipe.kept(), "fingerprint", None)
    if own is not None and not isinstance(own, str):
        raise DataError(f"{recipe.key}: fingerprint is a {type(own).__name__}; give a text, equal where the data is")
    content = own.encode() if own is not None else seen.input_ids.numpy().tobytes() + seen.labels.numpy().tobytes()
    return hashlib.sha256(f"{counts} {recipe.seq_len} ".encode() + content).hexdigest()
