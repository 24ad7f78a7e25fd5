"""`train.samples`: text generation after a validation, in whatever layout the model is trained.

    prompts, filled up to one width --> engine.evaluate, whose loss is exchanged for a look at the logits
    every rank has some of them: rows (a slice of the sequence), columns (a part of the vocabulary), or none
    --> all-reduce: scores of the next token, the same on every rank --> rank 0 chooses --> the next round

It uses the forward of a validation, so every layout that validates can generate, without more memory: at most as many
rows as a micro-batch, none longer than data.seq_len. No keys or values are cached between tokens: each token costs a
forward over the width. No random number of the training is drawn, so a run computes the same with and without samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist

from configs.choices import DataSource
from configs.errors import ConfigError, first_line
from configs.schema import Config
from trainer.axes import CONTEXT, TENSOR
from trainer.data import IGNORED, Batch, DataSet, mixture
from trainer.data.positions import key_of
from trainer.data.tokenizer import begin_of_document
from trainer.engine import Engine
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime
from trainer.process.watchdog import watched
from trainer.report.metrics import SampleMetrics

FROM_VALIDATION = 32
"""Number of prompt tokens from a validation sample in which all labels count."""
STEP = 64
"""Rows grow by this many tokens at a time, which suits kernels."""


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    ids: list[int]


class Sampler:
    """The prompts of a run. generation: generation_config.json of the model's weights, if this rank has it. Raises
    ConfigError for prompts that leave no room."""

    def __init__(self, config: Config, data: DataSet, plan: Plan, runtime: Runtime, generation: bytes | None) -> None:
        self.asked, self.seed = config.train.samples, config.train.seed
        self.plan, self.runtime, self.tokenizer = plan, runtime, data.tokenizer
        # Another width would be compiled again.
        self.widths = plan.batch.seq_len if config.train.compile else _unit(plan)
        if not data.tokenizer.get_vocab():
            raise ConfigError("train.samples: the data brings no tokenizer to write with; set data.tokenizer")
        self.prompts = [*_given(config, data.tokenizer), *_taken(config, data)]
        self.vocabulary = 0
        self.generation = generation

    def write(self, engine: Engine, step: int) -> list[SampleMetrics]:
        """One line per prompt, the same on every rank. A collective."""
        lines: list[SampleMetrics] = []
        rows = self.plan.batch.micro_batch_size
        ends = self._ends(engine)
        with engine.averaged():
            for first in range(0, len(self.prompts), rows):
                group = self.prompts[first : first + rows]
                keys = [key_of(self.seed, step, first + row) for row in range(len(group))]
                written = self._continue(engine, [prompt.ids for prompt in group], ends, keys)
                for row, (prompt, ids) in enumerate(zip(group, written, strict=True)):
                    text, ended = self._text(prompt.ids, ids, ends), bool(ids) and ids[-1] in ends
                    number = first + row + 1
                    lines.append(SampleMetrics(step=step, number=number, prompt=prompt.text, text=text, ended=ended))
        return lines

    def _continue(
        self, engine: Engine, prompts: Sequence[list[int]], ends: set[int], keys: Sequence[int]
    ) -> list[list[int]]:
        """The tokens after each prompt, at most `tokens`; the last one may be one of `ends`."""
        written: list[list[int]] = [[] for _ in prompts]
        draws = [torch.Generator().manual_seed(key % 2**63) for key in keys]
        for _ in watched(iter(range(self.asked.tokens)), "samples"):
            rows = [prompt + ids for prompt, ids in zip(prompts, written, strict=True)]
            scores = self._scores(engine, rows)
            for ids, chosen in zip(written, self._choose(scores, draws), strict=True):
                if not ids or ids[-1] not in ends:
                    ids.append(chosen)
            if all(ids[-1] in ends for ids in written):
                break
        return written

    def _scores(self, engine: Engine, rows: Sequence[list[int]]) -> torch.Tensor:
        """Scores of every vocabulary entry as the next token, float64 [rows, vocabulary]. A collective."""
        longest, seq_len = max(map(len, rows)), self.plan.batch.seq_len
        # Its difference from data.seq_len is divisible by the layout, so this width is divisible too.
        width = seq_len - (seq_len - longest) // self.widths * self.widths
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            labels[number, len(row) - 1] = number  # marks the row that a piece of logits belongs to
        with engine.objective.picking() as picked:
            engine.evaluate(Batch(ids, labels).to(self.runtime.device))
        first = engine.objective.first
        if not self.vocabulary:
            here = max((first + logits.shape[-1] for _, logits in picked), default=0)
            self.vocabulary = int(self.runtime.max(here)[0])
        scores = torch.zeros(len(rows), self.vocabulary, dtype=torch.float64, device=self.runtime.device)
        if self._speaks(first):
            for numbers, logits in picked:
                scores[numbers, first : first + logits.shape[-1]] = logits.double()
        dist.all_reduce(scores)
        return scores.cpu()

    def _speaks(self, first: int) -> bool:
        """Whether this rank's logits are unique: replicas hold the same, and so do tensor-parallel ranks with full
        logits."""
        alone = first > 0 or self.plan.coordinates(self.runtime.rank)[TENSOR] == 0
        return alone and self.plan.data_rank(self.runtime.rank) == 0

    def _choose(self, scores: torch.Tensor, draws: Sequence[torch.Generator]) -> list[int]:
        """Rank 0's choice for each row. A collective."""
        heat = self.asked.temperature
        if heat > 0:
            chosen = [
                int(torch.multinomial(row, 1, generator=draw)) if row.sum() > 0 else 0
                for row, draw in zip(chances(scores, heat), draws, strict=True)
            ]
        else:
            chosen = scores.argmax(-1).tolist()
        sent = torch.tensor(chosen, device=self.runtime.device)
        dist.broadcast(sent, src=0)
        return sent.tolist()

    def _ends(self, engine: Engine) -> set[int]:
        """End tokens: from the model's config, its generation file, and the tokenizer. A collective."""
        said = [getattr(engine.model.generation_config, "eos_token_id", None), self.tokenizer.eos_token_id]
        with suppress(ValueError, AttributeError):  # no JSON, or no object
            said.append(json.loads(self.generation or b"{}").get("eos_token_id"))
        each = [end for ends in said for end in (ends if isinstance(ends, list) else [ends])]
        # Only rank 0 reads the file.
        return set[int]().union(*self.runtime.gather({end for end in each if isinstance(end, int)}))

    def _text(self, before: list[int], ids: list[int], ends: set[int]) -> str:
        """The text that the ids add to the preceding text: decoded alone, the first id might lose a space."""
        new = ids[:-1] if ids and ids[-1] in ends else ids
        whole, start = (_decoded(self.tokenizer, part) for part in (before + new, before))
        return whole[len(start) :] if whole.startswith(start) else _decoded(self.tokenizer, new)


def build_sampler(
    config: Config, data: DataSet, plan: Plan, runtime: Runtime, generation: bytes | None
) -> Sampler | None:
    """None if the run generates no samples."""
    asked = config.train.samples
    return Sampler(config, data, plan, runtime, generation) if asked.prompts or asked.from_validation else None


def chances(scores: torch.Tensor, heat: float) -> torch.Tensor:
    """Probability of each token at a temperature, [rows, vocabulary]; a row of zeros if the scores are not numbers."""
    # Relative to the most likely token: a score divided by a tiny temperature would be infinite.
    return ((scores - scores.amax(-1, keepdim=True)) / heat).softmax(-1).nan_to_num()


def _unit(plan: Plan) -> int:
    ranks = plan.degree(CONTEXT) * plan.degree(TENSOR)
    return ranks * ceil(STEP / ranks)


def _given(config: Config, tokenizer: Any) -> Iterator[Prompt]:
    """The prompts of the configuration."""
    asked, room = config.train.samples, config.data.seq_len - config.train.samples.tokens
    text_parts = [part for part in mixture.parts(config) if part.config.data.source is not DataSource.chat]
    chat, beginning = not text_parts, _beginning(text_parts, tokenizer) if asked.prompts else ()
    problems: list[str] = []
    for number, prompt in enumerate(asked.prompts, start=1):
        text, begin = prompt, ()
        if chat:
            message = [{"role": "user", "content": prompt}]
            try:
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template is a program and can fail in any way
                problems.append(
                    f"train.samples.prompts: number {number}: the chat template fails on one message of the user"
                    f" ({type(error).__name__}: {first_line(error)}); use train.samples.from_validation, or mend it"
                )
                continue
        else:
            begin = beginning
        ids = [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(ids) > room:
            problems.append(
                f"train.samples.prompts: number {number} has {len(ids)} tokens, which leaves no room for"
                f" train.samples.tokens={asked.tokens} in data.seq_len={config.data.seq_len}; shorten it, or write less"
            )
        elif not ids:
            problems.append(f"train.samples.prompts: number {number} has no token; write some text")
        yield Prompt(text, ids)
    if problems:
        raise ConfigError(*problems)


def _beginning(parts: Sequence[mixture.Part], tokenizer: Any) -> tuple[int, ...]:
    """The tokens that begin a text, equal in all sources of text. Raises ConfigError if they differ."""
    begins = {begin_of_document(part.config, tokenizer): part for part in parts}
    if len(begins) > 1:
        ways = " and ".join(f"{part.label}data.bos={part.config.data.bos}" for part in begins.values())
        raise ConfigError(
            f"train.samples.prompts: the sources begin a text in different ways ({ways}); use"
            " train.samples.from_validation, or give all sources one data.bos"
        )
    return next(iter(begins), ())


def _taken(config: Config, data: DataSet) -> Iterator[Prompt]:
    """Beginnings of validation samples, as prompts."""
    asked, room = config.train.samples, config.data.seq_len - config.train.samples.tokens
    if not asked.from_validation:
        return
    batch = data.beginnings(asked.from_validation)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        known = sum(label != IGNORED for label in labels)
        before = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
        length = before + 1 if before else min(FROM_VALIDATION, known)
        ids = ids[: max(1, min(length, room))]
        yield Prompt(_decoded(data.tokenizer, ids, every=True), ids)


def _decoded(tokenizer: Any, ids: list[int], *, every: bool = False) -> str:
    """every: include control tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=not every))
