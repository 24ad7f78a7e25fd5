"""Differences between a layout and a single process, and the table of the measured differences."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from tests.support.cases import Trained, train
from tests.support.harness import run_ranks
from tests.support.shared import once

# Small and deliberately awkward: ragged valid tokens, accumulation, active clipping, indivisible vocabulary.
COMMON = [
    "data=synthetic",
    "data.seq_len=32",
    "data.ignore_fraction=0.6",
    "train.global_batch_size=8",
    "train.clip_grad_norm=0.25",
    "train.eval_samples=6",
    "optimizer.lr=3e-3",
    "scheduler.warmup_steps=2",
]
LLAMA = [
    "model=tiny",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=96",
    "model.config.vocab_size=261",
]
QWEN3 = [
    "model=tiny_qwen3",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=96",
    "model.config.vocab_size=261",
]
GPT2 = ["model=tiny_gpt2", "model.config.n_embd=64", "model.config.vocab_size=261"]
MODELS = {"llama": LLAMA, "qwen3": QWEN3, "gpt2": GPT2}
EXPERTS = ["model.config.num_experts_per_tok=2", "model.config.moe_intermediate_size=32"]
MIXTURES = {
    "qwen3_moe": [*LLAMA, "model.config.model_type=qwen3_moe", "model.config.num_experts=8", *EXPERTS],
    "mixtral": [*LLAMA, "model.config.model_type=mixtral", "model.config.num_local_experts=8", EXPERTS[0]],
}
"""Models that route each token to 2 of 8 experts, with float32 routers."""


@dataclass(frozen=True)
class Distance:
    """Largest differences from the single process.

    loss: relative difference over all steps.
    grad_norm: relative difference over all steps.
    parameters: difference of the final parameters, relative to the largest element of each tensor.
    """

    loss: float
    grad_norm: float
    parameters: float

    @property
    def largest(self) -> float:
        return max(self.numbers)

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.loss, self.grad_norm, self.parameters


@dataclass(frozen=True, order=True)
class Row:
    """One measured distance: a row of the table in the docs."""

    layout: str
    keys: str
    processes: int
    model: str
    precision: str
    distance: Distance = field(compare=False)

    @property
    def adapters(self) -> bool:
        return "tuning=" in self.keys

    @property
    def cells(self) -> tuple[str, str, int, str, str]:
        return self.layout, self.keys, self.processes, self.model, self.precision


ROWS: list[Row] = []


@once
def reference(model: str, precision: str, steps: int, *extra: str) -> Trained:
    """Train a single process on the same global batch. Fails if the loss did not fall: equality would mean little."""
    trained = run_ranks(1, train, words(model, "single", precision, steps, *extra))[0]
    assert all(math.isfinite(loss) for loss in trained.losses)
    assert trained.losses[-1] < trained.losses[0] - 0.05, f"the reference did not train: {trained.losses}"
    assert max(trained.grad_norms) > 0.25, "clipping was never active"
    return trained


def words(model: str, layout: str, precision: str, steps: int, *extra: str) -> list[str]:
    return [
        *COMMON,
        *{**MODELS, **MIXTURES}[model],
        f"parallel={layout}",
        f"precision={precision}",
        f"train.steps={steps}",
        *extra,
    ]


def distance(found: Trained, expected: Trained) -> Distance:
    assert found.parameters.keys() == expected.parameters.keys()
    assert len(found.losses) == len(expected.losses)
    return Distance(
        loss=_relative([*found.losses, found.validation], [*expected.losses, expected.validation]),
        grad_norm=_relative(found.grad_norms, expected.grad_norms),
        parameters=max(_apart(found.parameters[name], value) for name, value in expected.parameters.items()),
    )


def measure(
    layout: list[str], world_size: int, *, model: str, precision: str, steps: int, extra: tuple[str, ...] = ()
) -> Distance:
    """Train under a layout and compare with the single process.

    layout: the preset, followed by overrides.
    extra: overrides for both runs.
    """
    preset, *keys = layout
    expected = reference(model, precision, steps, *extra)
    ranks = run_ranks(world_size, train, words(model, preset, precision, steps, *extra, *keys))
    for other in ranks[1:]:
        assert other.losses == ranks[0].losses, "ranks report different losses"
        assert other.grad_norms == ranks[0].grad_norms, "ranks report different gradient norms"
    found = distance(ranks[0], expected)
    ROWS.append(Row(preset, " ".join([*keys, *extra]), world_size, model, precision, found))
    return found


def render_table(rows: Iterable[Row]) -> str:
    """The text of docs/parity.md. If rows differ only in their distance, the first is used."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    unique = sorted({row: row for row in reversed(list(rows))}.values())
    lines = [
        "# Parity: every layout against one process",
        "",
        "Each row trains the same small model on the same global batch, once in one process and once under the",
        "layout, on a CPU with gloo: ragged numbers of valid tokens, active clipping, a vocabulary that does not",
        "divide evenly. The columns give the largest relative difference: of the loss at any step and of the final",
        "validation loss, of the global gradient norm at any step, and of any parameter at the end (relative to the",
        "largest element of its tensor). The tests fail beyond 1e-10 in float64 and 1e-5 in float32, and if the",
        "reference did not train. In float32, engine torch must meet that limit in loss and gradient norm: at the",
        "learning rate of these rows Adam magnifies the rounding of parameters. DeepSpeed's rows use another one.",
        "",
        f"Last written by `pytest tests --write-docs` with {versions}, Python {platform.python_version()}: it puts the",
        "rows that were measured in the place of the earlier ones.",
        "",
        *_table("layout", [row for row in unique if not row.adapters]),
        "",
        "## Adapters",
        "",
        "Of `tuning=lora` and `tuning=qlora` ([fine-tuning](fine-tuning.md)), against one process that trains the same",
        "adapters; *parameters* are theirs. The tests fail beyond 1e-8 in float64 and 1e-4 in float32: while an",
        "adapter is young its gradients are small, and Adam magnifies their rounding.",
        "",
        *_table("adapters under", [row for row in unique if row.adapters]),
    ]
    return "\n".join(lines) + "\n"


def read_rows(page: str) -> list[Row]:
    """The rows of docs/parity.md, with the printed (rounded) distances."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return [
        Row(layout, keys, int(processes), model, precision, Distance(*(float(number) for number in numbers)))
        for layout, keys, processes, model, precision, *numbers in cells
        if processes.isdecimal()
    ]


def _table(title: str, rows: list[Row]) -> Iterator[str]:
    yield f"| {title} | further keys | processes | model | precision | loss | grad norm | parameters |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        far = row.distance
        numbers = f"{far.loss:.0e} | {far.grad_norm:.0e} | {far.parameters:.0e}"
        yield f"| {row.layout} | {row.keys} | {row.processes} | {row.model} | {row.precision} | {numbers} |"


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()
