"""An estimate answers in seconds because it skips repetitions, equivalent ranks, and changes that cannot help."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs import waiting
from configs.load import load_config
from launch.estimate import main
from tests.support.selection import rows
from trainer.axes.pipeline.orders import rank_orders
from trainer.estimate import family, pipelined, tracing
from trainer.estimate import suggest as suggesting
from trainer.estimate.estimate import Estimate, estimate, planned_device, planned_machine
from trainer.estimate.profile import Part
from trainer.estimate.profiles import get_profile
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine


def test_time_does_not_depend_on_the_number_of_gpus(cache: str) -> None:
    words = ["model=llama3_1_405b", "parallel=3d", "parallel.tp=8", "parallel.pp=4", "precision=bf16", cache]
    words += ["train.gradient_accumulation_steps=16", "cluster=8xh100", "parallel.sequence_parallel=true"]
    spent, peaks = [], []
    for nodes in (16, 2048):
        config = load_config([*words, f"cluster.nodes={nodes}"])
        plan = make_plan(config, Machine(gpus=8))
        estimate(config, plan)
        begun = time.process_time()
        peaks.append(estimate(config, plan).busiest.peak_allocated_bytes)
        spent.append(time.process_time() - begun)
    assert peaks[0] == peaks[1] and max(spent) < 3


@pytest.mark.parametrize(
    "schedule",
    rows(
        zip(("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")),
        lambda schedule: schedule in ("interleaved_1f1b", "interleaved_zero_bubble"),
    ),
)
def test_a_step_without_its_repetitions_needs_the_same(
    schedule: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["model=tiny", "model.config.num_hidden_layers=8", "parallel=pipeline_fsdp", "parallel.pp=4", cache]
    words += ["precision=bf16", "cluster=8xh100", "data.seq_len=64", f"parallel.pipeline.schedule={schedule}"]
    config = load_config([*words, "train.micro_batch_size=1", "train.gradient_accumulation_steps=24"])
    plan = make_plan(config, Machine(gpus=8))
    short = [rank.peak_allocated_bytes for rank in estimate(config, plan).ranks]
    played = pipelined.shortest_orders(schedule, pp=4, micro_batches=24, stages_per_rank=None)
    # The run time is proportional to the number of actions.
    assert sum(map(len, played)) <= 0.7 * sum(map(len, rank_orders(schedule, pp=4, micro_batches=24)))
    monkeypatch.setattr(pipelined, "shortest_orders", rank_orders)
    # The last rank of interleaved_zero_bubble peaks in another action, 0.33 % lower.
    assert short == pytest.approx([rank.peak_allocated_bytes for rank in estimate(config, plan).ranks], rel=4e-3)


@pytest.mark.parametrize("schedule", ["gpipe", "looped_bfs"])
def test_a_step_that_holds_all_micro_batches_follows_from_a_few(
    schedule: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["model=tiny", "model.config.num_hidden_layers=8", "parallel=pipeline_fsdp", "parallel.pp=4", cache]
    words += ["precision=bf16", "cluster=8xh100", "data.seq_len=64", f"parallel.pipeline.schedule={schedule}"]
    config = load_config([*words, "train.micro_batch_size=1", "train.gradient_accumulation_steps=40"])
    plan = make_plan(config, Machine(gpus=8))

    def exact(found: Estimate) -> list[object]:
        return [
            (rank.components, rank.highest, rank.peak_phase, rank.peak_step, rank.between_steps_bytes, rank.host_bytes)
            for rank in found.ranks
        ]

    replayed = []
    replay = pipelined.replay_stages
    monkeypatch.setattr(pipelined, "replay_stages", lambda *args, **given: replayed.append(1) or replay(*args, **given))
    short = estimate(config, plan)
    monkeypatch.setattr(pipelined, "repeats_only", lambda *_: False)
    few, whole = len(replayed), estimate(config, plan)
    assert few >= 3 * (len(replayed) - few) and exact(short) == exact(whole)
    reserved = [rank.peak_reserved_bytes for rank in whole.ranks]
    assert [rank.peak_reserved_bytes for rank in short.ranks] == pytest.approx(reserved, rel=5e-3, abs=2**23)


def test_ranks_that_do_the_same_are_replayed_once(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model=tiny", "model.config.num_hidden_layers=8", "parallel=pipeline_fsdp", "parallel.pp=8", cache]
    words += ["parallel.pipeline.schedule=gpipe", "train.gradient_accumulation_steps=16", "cluster=8xh100"]
    config = load_config([*words, "cluster.nodes=4"])
    replayed = []
    replay = pipelined.replay_stages
    monkeypatch.setattr(pipelined, "replay_stages", lambda *args, **given: replayed.append(1) or replay(*args, **given))
    found = estimate(config, make_plan(config, Machine(gpus=8)))
    assert [rank.kind for rank in found.ranks] == [f"pp{stage}" for stage in range(8)] and len(replayed) == 3


def test_changes_that_cannot_help_are_not_traced(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model=llama3_2_1b", "parallel=pipeline_fsdp", "cluster=4xa10", "data.seq_len=64", cache]
    config = load_config([*words, "train.micro_batch_size=1", "cluster.gpu_memory_gib=3", "precision=bf16"])
    machine = planned_machine(config, Machine())
    plan = make_plan(config, machine)
    before = estimate(config, plan)
    asked = []
    monkeypatch.setattr(suggesting, "estimate", lambda *args, **given: asked.append(args) or before)
    assert not before.fits and suggesting.suggest(config, plan, machine, before) == []
    # Half of the model's gradients and copies alone exceed 3 GiB, so changes that do not reduce them are not estimated.
    assert asked and not any(replace(args[0], train=config.train) == config != args[0] for args in asked)


def test_of_a_pipeline_that_does_not_fit_one_place_is_asked(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model=tiny", "model.config.num_hidden_layers=8", "parallel=pipeline", "parallel.pp=4", cache]
    words += ["cluster=8xh100", "cluster.gpus_per_node=4", "estimate.context_gib=0", "estimate.nccl_gib=0"]
    words += ["data.seq_len=64", "train.micro_batch_size=16", "cluster.gpu_memory_gib=0.12"]
    config = load_config(words)
    machine = planned_machine(config, Machine())
    plan = make_plan(config, machine)
    before = estimate(config, plan)
    asked = []

    def ask(*args: Any, **given: Any) -> Estimate:
        asked.append(estimate(*args, **given))
        return asked[-1]

    monkeypatch.setattr(suggesting, "estimate", ask)
    suggestions = suggesting.suggest(config, plan, machine, before)
    assert not before.fits and suggestions
    refused = [found for found in asked if not found.fits]
    assert refused and all(len(found.ranks) == 1 for found in refused)
    for suggestion in suggestions:
        changed = load_config([*words, *suggestion.overrides])
        every = estimate(changed, make_plan(changed, machine))
        assert every.fits and every.busiest == suggestion.estimate.busiest, suggestion.overrides


def test_the_largest_micro_batch_of_a_pipeline_fits_everywhere_and_one_more_does_not(cache: str) -> None:
    words = ["model=tiny", "model.config.num_hidden_layers=8", "parallel=pipeline", "parallel.pp=4", cache]
    words += ["cluster=8xh100", "cluster.gpus_per_node=4", "estimate.context_gib=0", "estimate.nccl_gib=0"]
    words += ["data.seq_len=64", "cluster.gpu_memory_gib=0.3"]
    config = load_config([*words, "train.micro_batch_size=1"])
    size = suggesting.largest_micro_batch(config, make_plan(config, Machine(gpus=4)))
    assert size is not None and size > 1
    fits = []
    for number in (size, size + 1):
        config = load_config([*words, f"train.micro_batch_size={number}"])
        fits.append(estimate(config, make_plan(config, Machine(gpus=4))).fits)
    assert fits == [True, False]


@pytest.mark.parametrize(
    "words",
    rows(
        zip(("model=tiny_gpt2 parallel=ddp", "model=tiny parallel=fsdp train.chunked_loss=true")),
        lambda words: "chunked_loss" in words,
    ),
)
def test_other_shapes_of_a_traced_model_are_what_a_trace_says(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    part = tracing.Tracer.part
    monkeypatch.setattr(tracing.Tracer, "part", lambda *args, **given: traced.append(1) or part(*args, **given))

    def parts(batch: int, length: int, *, folder: str, alone: int | None = None) -> Mapping[str, Part]:
        shape = [f"train.micro_batch_size={batch}", f"data.seq_len={length}", f"data.cache_dir={tmp_path / folder}"]
        config = load_config([*words.split(), "precision=bf16", "cluster=8xh100", *shape])
        plan = make_plan(config, Machine(gpus=8))
        return get_profile(config, plan, planned_device(config, plan).gpu, alone=alone).parts

    parts(1, 256, folder="family", alone=0)
    first = len(traced)
    held_out = [(1, 512), (5, 448)]
    evaluated = [parts(*shape, folder="family", alone=0) for shape in held_out]
    assert len(traced) == first
    assert evaluated == [parts(*shape, folder="alone") for shape in held_out]
    # The lengths of a family are multiples of 64. The length 288 is none, so it is traced.
    assert parts(1, 288, folder="family") and len(traced) == first + len(held_out) + 1
    # With alone=1, only one shape may be traced without its family, so the second shape traces its family.
    counts = []
    for length in (256, 384, 512):
        before = len(traced)
        parts(1, length, folder="second", alone=1)
        counts.append(len(traced) - before)
    assert counts[0] == 1 and counts[1] >= 3 and counts[2] == 0


def test_a_trace_with_far_more_steps_than_the_shape_asked_for_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int | None] = []
    part = tracing.Tracer.part

    def noted(*args: Any, most: int | None = None, **more: Any) -> Part:
        given.append(most)
        return part(*args, most=most, **more)

    monkeypatch.setattr(tracing.Tracer, "part", noted)
    words = ["model=tiny", "parallel=ddp", "precision=bf16", "cluster=8xh100", "train.micro_batch_size=1"]
    words.append(f"data.cache_dir={tmp_path}")

    def asked(length: int) -> Mapping[str, Part]:
        config = load_config([*words, f"data.seq_len={length}"])
        plan = make_plan(config, Machine(gpus=8))
        return get_profile(config, plan, planned_device(config, plan).gpu, alone=0).parts

    monkeypatch.setattr(family, "most_births", lambda part: 10)
    assert asked(256)
    # The traces of neighbouring shapes were broken off. They are not tried again for another length.
    assert given[0] is None and given[1:] and set(given[1:]) == {10}
    tried = len(given)
    assert asked(512) and given[tried:] == [None]


def test_a_slow_answer_says_what_it_does_on_a_terminal(
    cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", -1.0)
    words = [
        "model=tiny",
        "cluster=8xh100",
        "estimate.search=true",
        "data.seq_len=64",
        "cluster.gpus_per_node=2",
        cache,
    ]
    main([*words, "train.global_batch_size=2"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    main([*words, "train.global_batch_size=2"])
    said = capsys.readouterr().err
    assert "searching: 1 estimates so far" in said and said.endswith("\r\x1b[K")
