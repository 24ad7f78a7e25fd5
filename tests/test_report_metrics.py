"""Keys and format of the lines in metrics.jsonl and on the terminal."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from configs.choices import ProgressDisplay
from trainer.report.metrics import MetricsFile, StepMetrics, Summary, Totals, ValidationMetrics, numbers, to_dict
from trainer.report.terminal import open_terminal, render, render_summary

STEP = StepMetrics(
    step=12,
    loss=4.12341,
    grad_norm=1.234,
    lr=3e-4,
    lr_of=None,
    moe=None,
    tokens_per_second=12345.4,
    step_seconds=0.3321,
    data_seconds=0.001,
    forward_backward_seconds=0.3,
    optimizer_seconds=0.03,
    mfu=None,
    peak_allocated_bytes=None,
    peak_reserved_bytes=None,
    peak_host_bytes=2**29,
    loss_scale=None,
    skipped_steps=0,
    tokens=4096,
    valid_tokens=4000,
    tokens_of=None,
)
ON_GPU = replace(
    STEP, mfu=0.4123, peak_allocated_bytes=3 * 2**30, peak_reserved_bytes=4 * 2**30, loss_scale=65536.0, skipped_steps=2
)
VALIDATION = ValidationMetrics(step=12, validation_loss=4.0, validation_perplexity=math.exp(4), tokens=4096)
# Scripts may rely on this format: `name value` or `value unit`, separated by two spaces.
LINE = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+)  loss (?P<loss>\S+)(  grad_norm (?P<grad_norm>\S+))?  lr (?P<lr>\S+)"
    r"  (?P<tokens>[\d,]+) tokens/s  (?P<ms>\d+) ms/step(  mfu (?P<mfu>[\d.]+)%)?(  memory (?P<memory>[\d.]+ [GM]iB))?"
    r"(  loss_scale (?P<loss_scale>\S+))?(  skipped_steps (?P<skipped>\d+))?"
)


def test_the_step_line_has_a_fixed_form() -> None:
    assert render(STEP, 200) == "step 12/200  loss 4.1234  grad_norm 1.23  lr 3.00e-04  12,345 tokens/s  332 ms/step"
    assert render(ON_GPU, 200) == (
        "step 12/200  loss 4.1234  grad_norm 1.23  lr 3.00e-04  12,345 tokens/s  332 ms/step  mfu 41.2%"
        "  memory 3.00 GiB  loss_scale 65536  skipped_steps 2"
    )
    assert render(VALIDATION, 200) == "step 12/200  validation_loss 4.0000  validation_perplexity 54.60"


@pytest.mark.parametrize("metrics", [STEP, ON_GPU, replace(STEP, loss=math.nan, grad_norm=None)])
def test_the_step_line_can_be_parsed(metrics: StepMetrics) -> None:
    found = LINE.fullmatch(render(metrics, 200))
    assert found
    assert int(found["step"]) == 12
    assert float(found["lr"]) == pytest.approx(3e-4)
    assert int(found["tokens"].replace(",", "")) == 12345
    assert (found["mfu"] is None) == (metrics.mfu is None)
    assert float(found["loss"]) == pytest.approx(metrics.loss, abs=1e-4, nan_ok=True)


def test_the_keys_of_each_kind_of_line() -> None:
    assert list(to_dict(STEP)) == [
        "kind", "step", "loss", "grad_norm", "lr", "lr_of", "moe", "tokens_per_second", "step_seconds",
        "data_seconds", "forward_backward_seconds", "optimizer_seconds", "mfu", "peak_allocated_bytes",
        "peak_reserved_bytes", "peak_host_bytes", "loss_scale", "skipped_steps", "tokens", "valid_tokens", "tokens_of",
    ]  # fmt: skip
    assert list(to_dict(VALIDATION)) == ["kind", "step", "validation_loss", "validation_perplexity", "sets", "tokens"]
    assert [to_dict(line)["kind"] for line in (STEP, VALIDATION)] == ["step", "validation"]


def test_each_group_of_parameters_says_its_learning_rate() -> None:
    two = replace(STEP, lr_of={"muon": 0.02, "adamw": 3e-4})
    assert "  lr muon 2.00e-02, adamw 3.00e-04  " in render(two, 200)
    assert numbers(two).items() >= {"lr/muon": 0.02, "lr/adamw": 3e-4}.items()


def test_trackers_get_the_numbers_that_are_known() -> None:
    assert "mfu" not in numbers(STEP)
    assert "step" not in numbers(STEP)
    assert numbers(ON_GPU)["mfu"] == 0.4123
    assert numbers(VALIDATION) == {"validation_loss": 4.0, "validation_perplexity": math.exp(4), "tokens": 4096}


def test_the_file_holds_json_even_where_a_number_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(replace(STEP, loss=math.nan, grad_norm=math.inf))
    # The file is readable before it is closed, since each line is flushed when it is written.
    (line,) = path.read_text().splitlines()
    assert "NaN" not in line
    assert json.loads(line) == {**to_dict(STEP), "loss": None, "grad_norm": None}
    file.close()


def test_what_is_no_line_of_metrics_is_left_out_where_a_run_goes_on(tmp_path: Path) -> None:
    path, whole = tmp_path / "metrics.jsonl", json.dumps(to_dict(STEP))
    path.write_text("\n".join(['{"step": 3}', "[]", '{"kind": ["step"], "step": 3}', "{", whole, '{"kind": "st']))
    MetricsFile(path, after_step=STEP.step).close()
    assert path.read_text() == whole + "\n"


def test_totals_keep_the_first_and_the_last_loss() -> None:
    totals = Totals()
    for loss, updated in ((3.0, True), (math.inf, False), (1.0, True)):
        totals.add_step(loss=loss, tokens=10, valid_tokens=9, updated=updated)
    totals.add_validation(2.5)
    assert (totals.steps, totals.tokens, totals.valid_tokens, totals.skipped_steps) == (3, 30, 27, 1)
    assert (totals.loss_first, totals.loss_last) == (3.0, 1.0)
    assert (totals.validation_loss_first, totals.validation_loss_last) == (2.5, 2.5)


def written(progress: ProgressDisplay, *, terminal: bool) -> str:
    """Return the terminal output of a run that shows two lines."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    shown = open_terminal(progress, 200, console=console)
    shown.say("[plan]")
    shown.begin()
    shown.advance(12)
    shown.show(STEP)
    shown.show(VALIDATION)
    shown.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_where_nobody_watches_a_bar_where_somebody_does() -> None:
    lines = written(ProgressDisplay.auto, terminal=False)
    assert lines == f"[plan]\n{render(STEP, 200)}\n{render(VALIDATION, 200)}\n"
    assert written(ProgressDisplay.lines, terminal=True) == lines
    bar = written(ProgressDisplay.auto, terminal=True)
    assert " 12/200 " in bar
    assert "loss 4.1234  grad_norm 1.23" in bar
    assert "\x1b[" in bar
    assert f"{render(VALIDATION, 200)}\n" in bar.replace("\r", "")
    assert written(ProgressDisplay.off, terminal=True) == "[plan]\n"


def test_the_summary_tells_before_and_after() -> None:
    summary = Summary(
        steps=200,
        tokens=409600,
        valid_tokens=409600,
        skipped_steps=0,
        seconds=61.23,
        loss_first=5.5,
        loss_last=2.0,
        validation_loss_first=5.5,
        validation_loss_last=2.25,
        tokens_per_second=12345.6,
        mfu=None,
        peak_allocated_bytes=None,
        peak_reserved_bytes=None,
        peak_host_bytes=2**29,
        run_dir="/runs/a",
        model_dir="/runs/a/model",
    )
    assert render_summary(summary).splitlines() == [
        "finished   200 steps, 409,600 tokens in 61.2 s",
        "training   loss 5.5000 -> 2.0000, perplexity 244.69 -> 7.39",
        "validation loss 5.5000 -> 2.2500, perplexity 244.69 -> 9.49",
        "speed      12,346 tokens/s in the median step",
        "memory     peak 512 MiB in the largest process (resident set)",
        "model      /runs/a/model",
        "report     /runs/a/report.html",
        "run        /runs/a",
    ]
    on_gpu = replace(
        summary,
        skipped_steps=3,
        mfu=0.4,
        peak_allocated_bytes=2**31,
        peak_reserved_bytes=3 * 2**30,
        model_dir=None,
        validation_loss_first=None,
        validation_loss_last=None,
    )
    assert render_summary(on_gpu).splitlines() == [
        "finished   200 steps, 3 without an update, 409,600 tokens in 61.2 s",
        "training   loss 5.5000 -> 2.0000, perplexity 244.69 -> 7.39",
        "speed      12,346 tokens/s in the median step, mfu 40.0%",
        "memory     peak 2.00 GiB allocated, 3.00 GiB reserved on the fullest GPU",
        "report     /runs/a/report.html",
        "run        /runs/a",
    ]
