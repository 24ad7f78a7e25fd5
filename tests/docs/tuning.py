"""The table of docs/fine-tuning.md: every method over the same steps, upon a model that has learnt something else."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import PlanError
from configs.load import load_config
from configs.schema import Config
from tests.support.cases import run_trainer
from tests.support.harness import run_ranks
from trainer.make_plan import make_plan
from trainer.passes import prepare_model
from trainer.plan.machine import Machine

MIB = 2**20
BASE_STEPS, STEPS = 200, 40
COMMON = (
    "model=tiny data.seq_len=128 train.global_batch_size=8 scheduler=constant optimizer.weight_decay=0 precision=fp32"
)
QUIET = "checkpoint.every=0 checkpoint.final=false logging.progress=lines"
TEXTS = Path(__file__).parents[2] / "docs"
"""What the methods are trained on: the base has read Python."""
METHODS = {
    "tuning=full": "1e-3",
    "optimizer=lomo": "0.1",
    "optimizer=mezo": "1e-4",
    "tuning=lora": "3e-3",
    "tuning=lora tuning.rslora=true": "3e-3",
    "tuning=lora tuning.dora=true": "3e-3",
    "tuning=lora tuning.init=pissa": "1e-3",
    "tuning=lora optimizer=mezo": "1e-2",
    "tuning=qlora": "3e-3",
    "tuning=ia3": "3e-2",
    "tuning=adapter": "3e-3",
    "tuning=prompt": "3e-2",
    "tuning=p_tuning": "3e-3",
    "tuning=prefix": "3e-2",
}
WITH = {
    "tensor parallel": "parallel=tensor",
    "pipelines": "parallel=pipeline",
    "context parallel": "parallel=context",
    "FSDP": "parallel=fsdp",
    "offload": "parallel=fsdp_offload",
    "ZeRO 1": "parallel=zero1",
    "ZeRO 2": "parallel=zero2",
    "ZeRO 3": "parallel=zero3",
    "recompute": "train.activation_checkpointing=full",
    "chunked loss": "train.chunked_loss=true",
    "compile": "train.compile=true",
    "accumulation": "train.gradient_accumulation_steps=2",
    "document mask": "data.document_mask=true",
    "fp16": "precision=fp16",
    "float8": "precision=fp8",
}
HEAD = [
    "| method | learning rate | trained | predicted, MiB | measured, MiB | loss before | loss after | not with |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
]
NOTHING = "-"


def methods() -> str:
    """Runs them all."""
    refused, lines = refusals(), list(HEAD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(folder / "base", f"{COMMON} {QUIET} optimizer.lr=3e-3 train.steps={BASE_STEPS} train.eval_samples=0")
        given = COMMON.replace("model=tiny", f"model.path={folder}/base/model model.weights=pretrained")
        given = f"{given} {QUIET} data=files data.paths=[{TEXTS}] train.eval_samples=16 train.steps={STEPS}"
        for number, (method, rate) in enumerate(METHODS.items()):
            overrides = f"{given} {method} optimizer.lr={rate} estimate.measure=true train.export=false"
            summary = _run(folder / str(number), overrides)
            lines.append(_row(method, rate, _trained(overrides), summary, refused[method]))
    return "\n".join(lines)


def check_methods(table: str) -> None:
    lines, refused = table.splitlines(), refusals()
    assert lines[:2] == HEAD, "another head"
    rows = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(rows) == list(METHODS), "other methods"
    for method, (rate, _, *numbers, left_out) in rows.items():
        assert (rate, left_out) == (METHODS[method], refused[method]), f"{method}: not with {refused[method]}"
        predicted, measured, before, after = map(float, numbers)
        assert abs(predicted / measured - 1) < 0.05, f"{method}: its memory is predicted badly"
        assert after <= before, f"{method}: has unlearnt"


def refusals() -> dict[str, str]:
    """What the plan refuses with a method, and without it does not."""
    chosen = {method: load_config(method.split()) for method in METHODS}
    found: dict[str, list[str]] = {method: [] for method in METHODS}
    for name, overrides in WITH.items():
        config = load_config(["cluster.device=cpu", "data.seq_len=128", *overrides.split()])
        allowed = _problems(config)
        for method, other in chosen.items():
            if _problems(replace(config, tuning=other.tuning, optimizer=other.optimizer)) - allowed:
                found[method].append(name)
    return {method: ", ".join(names) or NOTHING for method, names in found.items()}


def _problems(config: Config) -> set[str]:
    try:
        make_plan(config, Machine(world_size=8, local_world_size=8))
    except PlanError as error:
        return set(error.problems)
    return set()


def _run(folder: Path, overrides: str) -> dict[str, Any]:
    assert run_ranks(1, run_trainer, [*shlex.split(overrides), f"train.run_dir={folder}"], timeout=900) == [0], (
        overrides
    )
    return json.loads((folder / "summary.json").read_text())


def _trained(overrides: str) -> int:
    model = prepare_model(load_config(shlex.split(overrides)))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _row(method: str, rate: str, trained: int, summary: dict[str, Any], refused: str) -> str:
    memory = summary["memory"]
    sizes = [f"{memory[f'{kind}_allocated_bytes'] / MIB:.2f}" for kind in ("predicted", "measured")]
    losses = [f"{summary[f'validation_loss_{when}']:.3f}" for when in ("first", "last")]
    return f"| {' | '.join([f'`{method}`', rate, f'{trained:,}', *sizes, *losses, refused])} |"
