"""Refused, dropped and overflowed steps do no harm under DeepSpeed, and 16-bit steps stay near float32."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.support.cases import train
from tests.support.deepspeed_cases import WIDE, build_or_skip, spoil_and_drop, train_float16
from tests.support.harness import run_ranks
from tests.support.parity import reference, words
from tests.support.selection import rows
from tests.test_checkpoint_run import start_and_listen

ACCUMULATE = "train.gradient_accumulation_steps=2"
FLOAT32 = ["zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload", "zero1_tensor", "zero2_tensor"]
# With tensor parallelism there are two groups of two ranks, so both kinds of collective occur.
PROCESSES = {"zero1_tensor": 4, "zero2_tensor": 4}
# With 16-bit precision, the gradient is in other buffers than with float32.
OFTEN_NARROW = {"bf16": ("zero1", "zero3"), "fp16": ("zero2_tensor",)}
REFUSALS = [(layout, "fp32") for layout in FLOAT32] + [(layout, "bf16") for layout in FLOAT32 if layout != "zero2"]


# Each stage, offload and tensor parallelism. With 16-bit precision, stages 1 to 3 each have their own optimizer class.
OFTEN_REFUSED = {
    "fp32": ["zero2", "zero1_tensor"],
    "bf16": ["zero1", "zero3", "zero2_offload"],
}


@pytest.mark.parametrize(
    ("layout", "precision"),
    rows(REFUSALS, lambda layout, precision: layout in OFTEN_REFUSED[precision]),
)
def test_bad_gradient_is_refused_and_dropped_without_a_trace(layout: str, precision: str) -> None:
    run = words("llama", layout, precision, 6, ACCUMULATE)
    ranks = run_ranks(PROCESSES.get(layout, 2), spoil_and_drop, run, 2, 4)
    for rank in ranks:
        assert rank.refused
        assert not math.isfinite(rank.grad_norm)
        assert rank.same, "later steps saw the refused or the dropped gradient"


@pytest.mark.nightly
def test_messages_are_counted_on_request(tmp_path: Path) -> None:
    run = words("llama", "zero2", "fp32", 2, f"train.run_dir={tmp_path}", "train.export=false", "train.eval_samples=0")
    results = run_ranks(2, start_and_listen, [*run, "parallel.deepspeed.comms_logger=true"])
    assert [code for code, _ in results] == [0, 0]
    counted = [line for line in results[0][1] if line.startswith("messages: ")]
    assert any(re.fullmatch(r"messages: all_reduce of \d+ bytes: \d+ times, [0-9.]+ ms each", line) for line in counted)


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_bad_gradient_is_refused_and_dropped_on_disk(tmp_path: Path) -> None:
    run = words("llama", "zero3_nvme", "bf16", 6, *WIDE, f"parallel.offload.nvme_path={tmp_path}")
    build_or_skip(run)
    ranks = run_ranks(2, spoil_and_drop, run, 2, 4)
    assert all(rank.refused and rank.same for rank in ranks)


@pytest.mark.parametrize(
    ("precision", "tolerance", "layout"),
    rows(
        ((*precision, layout) for precision in (("bf16", 5e-3), ("fp16", 2e-3)) for layout in FLOAT32),
        lambda precision, _, layout: layout in OFTEN_NARROW[precision],
    ),
)
def test_16_bit_stays_near_float32(precision: str, tolerance: float, layout: str) -> None:
    expected = reference("llama", "fp32", 6, ACCUMULATE)
    # This model's float16 gradients never overflow at this scale. A skipped step would make the runs diverge.
    keys = (ACCUMULATE, "precision.loss_scale_init=1024")
    found = run_ranks(PROCESSES.get(layout, 2), train_float16, words("llama", layout, precision, 6, *keys))[0]
    assert all(found.updated)
    assert found.losses != expected.losses, "nothing was computed in 16 bit"
    assert max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)) <= tolerance
    norms = zip(found.grad_norms, expected.grad_norms, strict=True)
    assert max(abs(a - b) / b for a, b in norms) <= 0.05


@pytest.mark.parametrize(
    "layout",
    rows(
        zip(("zero1", "zero2", "zero2_offload", "zero3_offload", "zero1_tensor", "zero2_tensor"), strict=True),
        lambda layout: layout in ("zero1", "zero3_offload"),
    ),
)
def test_fp16_overflow_halves_the_scale_and_skips(layout: str) -> None:
    keys = ("precision.loss_scale_init=16777216", "precision.loss_scale_window=2", "train.clip_grad_norm=1.0")
    ranks = run_ranks(PROCESSES.get(layout, 2), train_float16, words("llama", layout, "fp16", 14, ACCUMULATE, *keys))
    found = ranks[0]
    assert all((rank.updated, rank.loss_scales) == (found.updated, found.loss_scales) for rank in ranks)
    scale, good_steps, grown = 2.0**24, 0, 0
    for updated, norm, used in zip(found.updated, found.grad_norms, found.loss_scales, strict=True):
        assert used == scale
        assert math.isfinite(norm) == updated
        good_steps = good_steps + 1 if updated else 0
        if not updated:
            scale /= 2
        elif good_steps == 2:
            scale, good_steps, grown = 2 * scale, 0, grown + 1
    assert not found.updated[0], "the first scale should overflow"
    assert grown > 0
    assert sum(found.updated) >= 4, "one overflow must not lead to the next"
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize("layout", rows(zip(("zero1", "zero3")), lambda layout: layout == "zero1"))
def test_growing_scale_leaves_the_gradient_alone(layout: str) -> None:
    """If DeepSpeed's own dynamic scale doubles after a step, it divides that step's gradient by the doubled scale."""
    run = words("llama", layout, "fp16", 6, ACCUMULATE, "precision.loss_scale_init=1024")
    growing = run_ranks(2, train_float16, [*run, "precision.loss_scale_window=2"])[0]
    constant = run_ranks(2, train_float16, [*run, "precision.loss_scale=1024"])[0]
    assert growing.loss_scales == [1024, 1024, 2048, 2048, 4096, 4096]
    assert constant.loss_scales == [1024] * 6
    norms = zip(growing.grad_norms, constant.grad_norms, strict=True)
    assert max(abs(a - b) / b for a, b in norms) <= 1e-2


def test_reduction_in_16_bit_is_coarser() -> None:
    """`precision.reduce_dtype` reaches DeepSpeed: the same run rounds its gradients in the reduction."""
    wide = run_ranks(2, train, words("llama", "zero2", "fp32", 3, ACCUMULATE))[0]
    narrow = run_ranks(2, train, words("llama", "zero2", "fp32", 3, ACCUMULATE, "precision.reduce_dtype=bfloat16"))[0]
    assert wide.losses[0] == narrow.losses[0]
    apart = abs(wide.grad_norms[0] - narrow.grad_norms[0]) / wide.grad_norms[0]
    assert 0 < apart < 1e-2
