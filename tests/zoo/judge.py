"""Compares a type under a layout with one process, and one process with transformers' own model."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from configs.load import load_config
from configs.schema import Config
from tests.support.cases import Trained
from tests.support.harness import RankFailed, run_ranks
from tests.support.parity import COMMON, distance
from tests.zoo.case import attempt, computes, count, predict, theirs
from tests.zoo.tiny import tiny

LIMIT = 1e-4
"""Limit on the relative difference of losses and gradient norms.

Some types compute parts in float32 at any precision; real errors are larger.
"""
SECONDS = 150
MEMORY = 0.05
"""Limit on the relative error of the estimated peak."""
SCALARS = 4096
"""Limit on the bytes of counters, losses and norms that the estimate omits."""
STABLE = ("optimizer.lr=1e-3", "optimizer.eps=1e-5")
FLOAT32 = 1e-3
"""Limit in float32, for DeepSpeed and for types that transformers cannot run in float64.

STABLE is used with it, because Adam amplifies rounding errors if the second moment is small.
"""
ADAPTED = ("tuning=lora", "tuning.rank=4")
TEXT_ONLY = "model.text_only=true"
T = TypeVar("T")
Verdict = dict[str, Any]
"""The result of a type under a layout.

verdict: ok, differs, refused, crash, hang or no model.
distance, note: present if applicable.
text_only: set if the verdict is that of the language model only, because the refusal of the whole model advises this.
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout.

    words: overrides of the layout.
    alike: overrides of both the layout and the reference process.
    wide: whether to compute in float64.
    measured: whether to compare its memory with the estimate, instead of its losses with one process.
    """

    processes: int
    words: tuple[str, ...]
    alike: tuple[str, ...] = ()
    wide: bool = True
    measured: bool = False


LAYOUTS = {
    "single": Layout(processes=1, words=()),
    "recompute": Layout(processes=1, words=("train.activation_checkpointing=full",)),
    "chunked loss": Layout(processes=1, words=("train.chunked_loss=true",)),
    "ddp": Layout(processes=2, words=("parallel=ddp",)),
    "fsdp": Layout(processes=2, words=("parallel=fsdp",)),
    "zero2": Layout(processes=2, words=("parallel=zero2",), wide=False),
    "zero3": Layout(processes=2, words=("parallel=zero3",), wide=False),
    "lora": Layout(processes=2, words=("parallel=fsdp",), alike=ADAPTED),
    "context": Layout(processes=2, words=("parallel=context",)),
    "expert": Layout(processes=2, words=("parallel=expert",)),
    "tensor": Layout(processes=2, words=("parallel=tensor",)),
    "sequence": Layout(processes=2, words=("parallel=tensor", "parallel.sequence_parallel=true")),
    "pipeline": Layout(processes=2, words=("parallel=pipeline", "train.gradient_accumulation_steps=2")),
    "memory": Layout(processes=1, words=("train.clip_grad_norm=1",), measured=True),
    "fsdp's memory": Layout(processes=2, words=("parallel=fsdp",), measured=True),
}
"""`single` is compared with transformers' own model."""


@functools.cache
def _composed(words: tuple[str, ...]) -> Config:
    """Compose a config once for each layout, since composing takes as long as a run."""
    own = ["train.steps=3", "parallel=single", "model.weights=random", "estimate.gate=off"]
    return load_config([*COMMON, *own, "model.path=FOLDER", "data.tokenizer=bytes", *words])


def _config(folder: Path, words: Sequence[str]) -> Config:
    config = copy.deepcopy(_composed(tuple(words)))
    config.model.path = str(folder)
    return config


@dataclass
class Visit:
    """The state of judging one type.

    folder: folder of its config.
    precision: widest precision in which transformers runs the type.
    known: verdicts by layout; `judge` adds to them.
    references: results of the reference processes, by their overrides.
    """

    folder: Path
    precision: str
    known: dict[str, Verdict]
    references: dict[tuple[str, ...], Trained | Verdict] = field(default_factory=dict)

    def judge(self, name: str) -> None:
        layout = LAYOUTS[name]
        if name == "single":
            self.known[name] = self._against_theirs()
        else:
            self.known[name] = self._measured(layout) if layout.measured else self._against_one(layout)

    def _measured(self, layout: Layout) -> Verdict:
        """Compare the memory of the fullest rank, counted over two steps, with its estimate."""
        words = ("precision=fp32", *layout.alike, *layout.words)
        found = self._run(1, predict, words, layout.processes)
        if isinstance(found, dict) and TEXT_ONLY in str(found["note"]):
            return {**self._measured(replace(layout, alike=(TEXT_ONLY,))), "text_only": True}
        if isinstance(found, dict):
            return found
        (peak, after), apart, between = found[0], math.inf, 0
        for _ in range(4):
            # A gloo thread may happen to keep a buffer past the step's peak, see test_memory_measured.
            measured = self._run(layout.processes, count, words)
            if isinstance(measured, dict):
                return measured
            apart = min(apart, abs(max(rank.peak for rank in measured) / peak - 1))
            between = abs(max(rank.after for rank in measured) - after)
            if apart <= MEMORY:
                break
        if apart > MEMORY:
            return {"verdict": "differs", "distance": apart, "note": f"the peak is {apart:.1%} from the estimate"}
        if between > SCALARS:
            return {"verdict": "differs", "distance": apart, "note": f"{between} bytes between steps are not estimated"}
        return {"verdict": "ok", "distance": apart}

    def _against_one(self, layout: Layout) -> Verdict:
        alike = (*layout.alike, *self._precisely(layout))
        expected = self._reference(alike)
        if isinstance(expected, dict):
            return {**expected, "note": f"one process: {expected['note']}"}
        found = self._train(layout.processes, (*alike, *layout.words))
        if isinstance(found, dict) and TEXT_ONLY in str(found["note"]):
            return {**self._against_one(replace(layout, alike=(*layout.alike, TEXT_ONLY))), "text_only": True}
        if isinstance(found, dict):
            return found
        try:
            apart = distance(found, expected)
        except AssertionError:
            return {"verdict": "differs", "note": "other parameters are trained"}
        return self._judged(max(apart.loss, apart.grad_norm), alike, "one process")

    def _against_theirs(self) -> Verdict:
        alike = self._precisely(LAYOUTS["single"])
        found = self._reference(alike)
        if isinstance(found, dict):
            return found
        if not min(found.grad_norms) > 0:
            return {"verdict": "differs", "note": f"it does not learn: gradient norms {found.grad_norms}"}
        try:
            loss, norm = run_ranks(1, theirs, _config(self.folder, alike), timeout=SECONDS)[0]
        except RankFailed as failed:
            return {"verdict": "crash", "note": _last_line(failed), "trace": str(failed)[-4000:]}
        apart = max(abs(found.losses[0] - loss) / abs(loss), abs(found.grad_norms[0] - norm) / norm)
        return self._judged(apart, alike, "transformers")

    def _precisely(self, layout: Layout) -> tuple[str, ...]:
        return ("precision=fp64",) if layout.wide and self.precision == "fp64" else ("precision=fp32", *STABLE)

    def _judged(self, apart: float, alike: tuple[str, ...], other: str) -> Verdict:
        if math.isfinite(apart) and apart <= (LIMIT if "precision=fp64" in alike else FLOAT32):
            return {"verdict": "ok", "distance": apart}
        return {"verdict": "differs", "distance": apart, "note": f"{apart:.1g} from {other}"}

    def _reference(self, words: tuple[str, ...]) -> Trained | Verdict:
        if words not in self.references:
            self.references[words] = self._train(1, words)
        return self.references[words]

    def _train(self, processes: int, words: tuple[str, ...]) -> Trained | Verdict:
        ranks = self._run(processes, attempt, words)
        if isinstance(ranks, dict):
            return ranks
        if not all(map(math.isfinite, (*ranks[0].losses, *ranks[0].grad_norms))):
            return {"verdict": "differs", "note": "a loss or a gradient norm is not finite"}
        if any(rank.losses != ranks[0].losses or rank.grad_norms != ranks[0].grad_norms for rank in ranks):
            return {"verdict": "differs", "note": "ranks report different losses"}
        return ranks[0]

    def _run(
        self, processes: int, work: Callable[..., T | str], words: Sequence[str], *more: object
    ) -> list[T] | Verdict:
        """Return the results of all ranks, or a verdict if a rank fails or the config is refused."""
        try:
            ranks = run_ranks(processes, work, _config(self.folder, words), *more, timeout=SECONDS)
        except RankFailed as failed:
            hung = "hung or died" in str(failed) and "Traceback" not in str(failed)
            return {"verdict": "hang" if hung else "crash", "note": _last_line(failed), "trace": str(failed)[-4000:]}
        refused = [rank for rank in ranks if isinstance(rank, str)]
        return {"verdict": "refused", "note": refused[0]} if refused else ranks


def visit(model_type: str, layouts: Sequence[str], known: dict[str, Verdict]) -> Iterator[str]:
    """Judge the layouts of the type that `known` lacks. Yields the name of each when its verdict is known."""
    wanted = [name for name in layouts if name not in known]
    if not wanted or known.get("single", {}).get("verdict") == "no model":
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            tiny(model_type).save_pretrained(folder)
            precision, failed = run_ranks(1, computes, folder, timeout=SECONDS)[0]
        except Exception as error:  # each architecture validates in its own way
            precision, failed = "", " ".join(f"{type(error).__name__}: {error}".split())
        if not precision:
            known["single"] = {"verdict": "no model", "note": failed[:300]}
            yield "single"
            return
        one = Visit(folder, precision, known)
        for layout in wanted:
            one.judge(layout)
            yield layout


def _last_line(failed: RankFailed) -> str:
    """The last line of the first rank's exception."""
    text = str(failed).split("\nrank 1:")[0]
    return text.strip().splitlines()[-1][:300]
