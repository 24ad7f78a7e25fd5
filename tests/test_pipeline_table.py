"""Stages, balance, rules and timelines agree with brute force, the papers' formulas and torch's own schedules."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.axes.pipeline import orders as pipeline_orders
from trainer.axes.pipeline import run as pipeline
from trainer.axes.pipeline import timeline as pipeline_timeline
from trainer.axes.pipeline.orders import Action, rank_orders
from trainer.axes.pipeline.receives import with_receives
from trainer.axes.pipeline.run import RUNNERS
from trainer.axes.pipeline.table import (
    SCHEDULES,
    check_pipeline,
    default_stages_per_rank,
    rank_of_stage,
    split_layers,
    stages_of_rank,
)
from trainer.axes.pipeline.timeline import bubble_fraction, draw_schedule, in_flight, receive_buffers


def test_split_is_the_best_there_is() -> None:
    draws = random.Random(1)
    for _ in range(500):
        layers = draws.randint(1, 8)
        stages = draws.randint(1, layers)
        costs = [draws.choice([1.0, draws.uniform(0.01, 4)]) for _ in range(layers)]
        embedding, head = draws.choice([0.0, draws.uniform(0, 6)]), draws.choice([0.0, draws.uniform(0, 8)])

        def slowest(ends: tuple[int, ...], costs: list[float] = costs, ends_cost: Any = (embedding, head)) -> float:
            sums = [sum(costs[begin:end]) for begin, end in itertools.pairwise((0, *ends))]
            sums[0] += ends_cost[0]
            sums[-1] += ends_cost[1]
            return max(sums)

        found = split_layers(layers, stages, embedding_cost=embedding, head_cost=head, layer_costs=costs)
        assert [layer for held in found for layer in held] == list(range(layers))
        assert all(len(held) >= 1 for held in found)
        every = ((*cuts, layers) for cuts in itertools.combinations(range(1, layers), stages - 1))
        best = min(slowest(ends) for ends in every)
        assert slowest(tuple(held.stop for held in found)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("layers", "stages", "head", "sizes"),
    [
        (8, 4, 0.0, [2, 2, 2, 2]),
        (5, 2, 0.0, [2, 3]),
        (32, 4, 2.4, [8, 9, 9, 6]),
        (26, 4, 7.6, [8, 8, 9, 1]),
        (126, 32, 0.7, None),
    ],
)
def test_split_counts_the_head(layers: int, stages: int, head: float, sizes: list[int] | None) -> None:
    found = [len(held) for held in split_layers(layers, stages, head_cost=head)]
    assert sum(found) == layers
    if sizes is not None:
        assert found == sizes


def test_split_as_asked() -> None:
    assert split_layers(6, 3, split=[3, 1, 2]) == [range(3), range(3, 4), range(4, 6)]
    for wrong in ([3, 3], [6, 0, 0], [1, 1, 1]):
        with pytest.raises(ValueError, match=r"parallel\.pipeline\.split="):
            split_layers(6, 3, split=wrong)
    with pytest.raises(ValueError, match="2 layers"):
        split_layers(2, 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_stage_has_one_rank(schedule: str, pp: int) -> None:
    v = default_stages_per_rank(schedule)
    owners = {
        stage: rank for rank in range(pp) for stage in stages_of_rank(schedule, pp=pp, rank=rank, stages_per_rank=v)
    }
    assert owners == {stage: rank_of_stage(schedule, pp=pp, stage=stage) for stage in range(pp * v)}


@pytest.fixture(params=[2, 3, 4])
def fake_group(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rules_and_orders_are_those_of_torch(schedule: str, fake_group: int) -> None:
    """A number of micro-batches is refused exactly if torch refuses it; otherwise the orders agree."""
    pp, accepted = fake_group, 0
    arrangement = SCHEDULES[schedule].arrangement
    for v, micro_batches in itertools.product([1] if arrangement == "one" else [2, 3], range(1, 4 * pp + 1)):
        owned = stages_of_rank(schedule, pp=pp, rank=0, stages_per_rank=v)
        stages = [PipelineStage(torch.nn.Identity(), stage, pp * v, torch.device("cpu")) for stage in owned]
        problems = list(check_pipeline(pp=pp, schedule=schedule, micro_batches=micro_batches, stages_per_rank=v))
        if problems:
            if arrangement == "v" and v != 2:
                continue  # torch would need three stages of a V, and no rank has three
            with pytest.raises(ValueError):
                RUNNERS[schedule](stages if v > 1 else stages[0], micro_batches)
            continue
        runner = RUNNERS[schedule](stages if v > 1 else stages[0], micro_batches)
        orders = rank_orders(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=v)
        accepted += 1
        if schedule != "1f1b":  # there torch's list for drawing starts at micro-batch 1; the parity tests check it
            assert orders == [list(_actions(runner.pipeline_order[rank])) for rank in range(pp)]
        if v > 1:
            posted = with_receives(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=v)
            assert posted == [list(_actions(runner.pipeline_order_with_comms[rank])) for rank in range(pp)]
    assert accepted > pp


RECEIVES = {"RECV_F": "RF", "RECV_B": "RB"}


def _actions(row: list[Any]) -> Iterator[Action]:
    for action in filter(None, row):
        for part in action.sub_actions or (action,):
            kind = RECEIVES.get(str(part.computation_type.name), part.computation_type.value)
            if kind in ("F", "B", "I", "W", "RF", "RB"):
                yield Action(kind, part.stage_index, part.microbatch_index)


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_bubble_is_the_papers_formula(pp: int, rounds: int) -> None:
    m = pp * rounds
    for schedule in ("gpipe", "1f1b"):
        assert bubble_fraction(schedule, pp=pp, micro_batches=m) == pytest.approx((pp - 1) / (m + pp - 1))
    for schedule, v in itertools.product(("interleaved_1f1b", "looped_bfs"), (2, 4)):
        found = bubble_fraction(schedule, pp=pp, micro_batches=m, stages_per_rank=v)
        assert found == pytest.approx((pp - 1) / (v * m + pp - 1))
    # A micro-batch has three units of work per stage; weight gradients fill two of the three waits.
    for v in (2, 4):
        found = bubble_fraction("interleaved_zero_bubble", pp=pp, micro_batches=m, stages_per_rank=v)
        assert found == pytest.approx((pp - 1) / (3 * v * m + pp - 1))
    for schedule in ("zbv_zero_bubble", "dualpipev"):
        assert bubble_fraction(schedule, pp=pp, micro_batches=4 * pp) < (pp - 1) / (3 * 2 * 4 * pp)


def test_uneven_stages_wait_longer() -> None:
    even = bubble_fraction("1f1b", pp=4, micro_batches=8)
    uneven = bubble_fraction("1f1b", pp=4, micro_batches=8, stage_costs=[1, 1, 1, 2])
    assert uneven > even
    assert bubble_fraction("1f1b", pp=4, micro_batches=8, stage_costs=[3, 3, 3, 3]) == pytest.approx(even)


def test_micro_batches_in_flight() -> None:
    assert in_flight("gpipe", pp=3, micro_batches=8) == [{0: 8}, {1: 8}, {2: 8}]
    assert in_flight("1f1b", pp=3, micro_batches=8) == [{0: 3}, {1: 2}, {2: 1}]
    assert in_flight("1f1b", pp=3, micro_batches=3) == [{0: 3}, {1: 2}, {2: 1}]
    for held in in_flight("zbv_zero_bubble", pp=4, micro_batches=16):
        assert sum(held.values()) == 8, "every rank of a V holds the same"
    # The peak is the moment with the most bytes, not with the most micro-batches.
    assert in_flight("interleaved_1f1b", pp=2, micro_batches=8)[0] == {0: 3, 2: 2}
    assert in_flight("interleaved_1f1b", pp=2, micro_batches=8, stage_weights=[50, 1, 1, 1])[0] == {0: 4, 2: 1}


def test_receive_buffers() -> None:
    # The counts are independent of the number of micro-batches once the pipeline is full.
    full = {
        "1f1b": [1, 3, 1],
        "interleaved_1f1b": [4, 8, 8],
        "interleaved_zero_bubble": [4, 9, 10],
        "zbv_zero_bubble": [5, 12, 6],
        "dualpipev": [4, 11, 5],
    }
    for schedule, count in itertools.product(full, (12, 18, 510)):
        assert receive_buffers(schedule, pp=3, micro_batches=count) == full[schedule], schedule
    # These schedules hold every micro-batch of a step.
    assert receive_buffers("gpipe", pp=3, micro_batches=8) == [1, 9, 8]
    assert receive_buffers("looped_bfs", pp=3, micro_batches=8) == [9, 17, 24]


def test_drawings_are_what_runs() -> None:
    heads = [
        (pipeline, "1f1b", 3, 6),
        *((pipeline_timeline, name, 4, 8) for name in ("gpipe", "1f1b", "zbv_zero_bubble")),
    ]
    for module, schedule, pp, micro_batches in heads:
        for line in draw_schedule(schedule, pp=pp, micro_batches=micro_batches).splitlines():
            assert line.split()[-1] in (module.__doc__ or "")
    words = [f"{a.kind}{a.micro_batch}" for a in rank_orders("1f1b", pp=4, micro_batches=4)[2]]
    assert " ".join(words) in (pipeline_orders.__doc__ or "")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"schedule": "2f2b"}, "parallel.pipeline.schedule=2f2b: no such schedule"),
        ({"schedule": "1f1b", "micro_batches": 3}, "train.gradient_accumulation_steps=3: 1f1b over 4 stages"),
        ({"schedule": "dualpipev", "micro_batches": 7}, "train.gradient_accumulation_steps=7: dualpipev over 8 stages"),
        ({"schedule": "interleaved_1f1b", "micro_batches": 9}, "in 2 equal rounds; use 8 or 12"),
        ({"schedule": "gpipe", "stages_per_rank": 2}, "parallel.pipeline.stages_per_rank=2: gpipe has one stage"),
        ({"schedule": "looped_bfs", "stages_per_rank": 1}, "parallel.pipeline.stages_per_rank=1: looped_bfs needs two"),
        ({"schedule": "zbv_zero_bubble", "stages_per_rank": 3}, "zbv_zero_bubble has exactly two stages"),
        ({"schedule": "1f1b", "num_layers": 3}, "parallel.pp=4: the model has 3 layers"),
        ({"schedule": "looped_bfs", "num_layers": 7}, "need at least 8"),
        ({"schedule": "1f1b", "num_layers": 8, "split": [4, 4]}, "has 2 entries, there are 4 stages"),
        ({"schedule": "1f1b", "num_layers": 8, "split": [4, 4, 0, 0]}, "a stage without a layer"),
        ({"schedule": "1f1b", "num_layers": 8, "split": [2, 2, 2, 3]}, "adds up to 9 layers, the model has 8"),
        ({"schedule": "zbv_zero_bubble", "checkpointing": "selective"}, "train.activation_checkpointing=selective: "),
        ({"schedule": "dualpipev", "compile": True}, "train.compile=true: dualpipev"),
    ],
)
def test_rules(keys: dict[str, Any], problem: str) -> None:
    found = list(check_pipeline(**{"pp": 4, "micro_batches": 8, **keys}))
    assert len(found) == 1, found
    assert problem in found[0]


def test_what_fits_is_not_refused() -> None:
    assert not list(check_pipeline(pp=4, schedule="1f1b", micro_batches=4, num_layers=4, checkpointing="selective"))
    assert not list(check_pipeline(pp=2, schedule="zbv_zero_bubble", micro_batches=1, num_layers=9, split=[1, 2, 3, 3]))


def test_tables_need_no_torch() -> None:
    modules = "table, orders, timeline"
    check = f"import sys; from trainer.axes.pipeline import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
