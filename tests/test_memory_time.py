"""What an estimate leaves out to answer in seconds: repetitions, ranks that do the same, changes that cannot help."""

from __future__ import annotations

import time
from typing import Any

import pytest

from configs.load import load_config
from trainer.axes.pipeline.orders import rank_orders
from trainer.estimate import pipelined
from trainer.estimate import suggest as suggesting
from trainer.estimate.estimate import Estimate, estimate, planned_machine
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine


def test_time_does_not_depend_on_the_number_of_gpus(cache: str) -> None:
    words = ["model=llama3_1_405b", "parallel=3d", "parallel.tp=8", "parallel.pp=16", "precision=bf16", cache]
    words += ["train.gradient_accumulation_steps=64", "cluster=8xh100", "parallel.sequence_parallel=true"]
    spent, peaks = [], []
    for nodes in (16, 2048):
        config = load_config([*words, f"cluster.nodes={nodes}"])
        plan = make_plan(config, Machine(gpus=8))
        estimate(config, plan)
        begun = time.process_time()
        peaks.append(estimate(config, plan).busiest.peak_allocated_bytes)
        spent.append(time.process_time() - begun)
    assert peaks[0] == peaks[1] and max(spent) < 3


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"])
def test_a_step_without_its_repetitions_needs_the_same(
    schedule: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["model=tiny", "model.config.num_hidden_layers=8", "parallel=pipeline_fsdp", "parallel.pp=4", cache]
    words += ["precision=bf16", "cluster=8xh100", "data.seq_len=64", f"parallel.pipeline.schedule={schedule}"]
    config = load_config([*words, "train.micro_batch_size=1", "train.gradient_accumulation_steps=24"])
    plan = make_plan(config, Machine(gpus=8))
    short = [rank.peak_allocated_bytes for rank in estimate(config, plan).ranks]
    played = pipelined.shortest_orders(schedule, pp=4, micro_batches=24, stages_per_rank=None)
    # Three times the actions cost three times the seconds.
    assert sum(map(len, played)) <= 0.7 * sum(map(len, rank_orders(schedule, pp=4, micro_batches=24)))
    monkeypatch.setattr(pipelined, "shortest_orders", rank_orders)
    assert short == pytest.approx([rank.peak_allocated_bytes for rank in estimate(config, plan).ranks], rel=2e-3)


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
    # Half of the model's gradients and copies alone are more than 3 GiB: what does not touch them is not asked for.
    assert all(args[0].parallel != config.parallel for args in asked)


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
