"""The planner's times move the right way, its overrides describe its layouts, and the layouts it shows fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from configs.choices import Checkpointing
from configs.errors import ConfigError
from configs.load import load_config
from launch.estimate import main
from tests.benchmarks.published import RUNS
from tests.support.selection import rows
from trainer.estimate.bounds import states_bytes, upper_bytes
from trainer.estimate.estimate import estimate
from trainer.estimate.search.candidates import candidates
from trainer.estimate.search.cost import EXPOSED, Dimensions, StepTime, step_time
from trainer.estimate.search.network import Network, RankGroup, build_network, group_of
from trainer.estimate.search.render import command, kept
from trainer.estimate.search.search import Search, search
from trainer.make_plan import make_plan
from trainer.optim.protocol import Work
from trainer.optim.table import moments
from trainer.plan.devices import GPUS
from trainer.plan.machine import Machine

H100 = next(gpu for gpu in GPUS if gpu.name == "H100-SXM")
# Llama 3.1 8B
SIZE = Dimensions(
    parameters=8_030_261_248,
    matrices=7_504_924_672,
    layers=32,
    hidden=4096,
    attention=4096,
    key_value=1024,
    vocabulary=128256,
    spans=(None,) * 32,
)
BASE = ["model=llama3_1_8b", "cluster=8xh100", "precision=bf16", "data.seq_len=4096", "train.global_batch_size=1024"]
FOUR = Machine(gpus=4)
SMALL = ["model=tiny", "cluster=8xh100", "precision=bf16", "data.seq_len=128", "train.global_batch_size=64"]


# The same model with 42 million adapter parameters, its layers' matrices in 4 bits.
LORA = replace(
    SIZE,
    parameters=SIZE.parameters + 41_943_040,
    matrices=SIZE.matrices + 41_943_040,
    frozen=SIZE.parameters,
    frozen_matrices=SIZE.matrices,
)
QLORA = replace(LORA, packed=6_979_321_856, packed_bytes=3_600_000_000)


def timed(*words: str, size: Dimensions = SIZE) -> StepTime:
    config = load_config([*BASE, "train.micro_batch_size=1", *words])
    size = replace(size, kept_bytes=int(4 * moments(config.optimizer) * size.trained))
    return step_time(config, make_plan(config, Machine(gpus=8)), size, H100)


MIXTURE = replace(SIZE, experts=8, chosen=2, in_experts=5_637_144_576)
"""The same model with its MLPs divided into experts; a token uses the same number of parameters as before."""


def test_divided_experts_send_tokens_and_are_not_gathered() -> None:
    fields = [
        "model.config.model_type=mixtral",
        "model.config.num_local_experts=8",
        "parallel.reshard_after_forward=true",
    ]
    gathered = timed("parallel=fsdp", *fields, size=MIXTURE).seconds
    divided = timed("parallel=expert", *fields, size=MIXTURE).seconds
    # A token goes to 8 * (1 - C(7, 2) / C(8, 2)) = 2 ranks and back, in forward and backward, in 32 layers.
    network, group = build_network(load_config(BASE), H100, 8), RankGroup(size=8, per_node=8)
    sent = 4 * 32 * network.all_to_all(4096 * 2 * 4096 * 2, group)
    assert divided["expert parallel"] == pytest.approx(16 * 8 * sent)
    assert "expert parallel" not in gathered
    assert divided["sharding, gradients"] < 0.5 * gathered["sharding, gradients"]
    assert divided["update"] == pytest.approx(gathered["update"])


def test_divided_experts_are_not_gathered_beside_adapters_either() -> None:
    fields = ["model.config.model_type=mixtral", "model.config.num_local_experts=8", "tuning=lora"]
    size = replace(LORA, experts=8, chosen=2, frozen_experts=5_637_144_576)
    gathered, divided = (timed(f"parallel={name}", *fields, size=size).seconds for name in ("fsdp", "expert"))
    trained = timed("parallel=expert", *fields[:2], "parallel.reshard_after_forward=true", size=MIXTURE).seconds
    assert divided["expert parallel"] == pytest.approx(trained["expert parallel"])
    assert divided["sharding, gradients"] < 0.5 * gathered["sharding, gradients"]


def test_the_search_proposes_experts_over_ranks_for_mixtures_alone() -> None:
    def degrees(*words: str) -> set[int]:
        config = load_config([*SMALL, *words])
        found = candidates(config, world_size=16, gpus_per_node=8)
        return {candidate.keys["parallel.ep"] for candidate in found if "parallel.ep" in candidate.keys}

    assert degrees() == set()
    assert degrees("model.config.model_type=qwen3_moe", "model.config.num_experts=128") == {8, 16}
    assert degrees("model.config.model_type=qwen3_moe", "model.config.num_experts=4") == {4}


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        (["parallel=fsdp"], ["parallel=fsdp", "train.activation_checkpointing=full"]),
        (["parallel=fsdp", "train.compile=true"], ["parallel=fsdp"]),
        (
            ["parallel=fsdp", "train.activation_checkpointing=selective"],
            ["parallel=fsdp", "train.activation_checkpointing=full"],
        ),
        (["parallel=tensor_fsdp", "parallel.tp=2"], ["parallel=tensor_fsdp", "parallel.tp=8"]),
        (["parallel=zero1"], ["parallel=zero2"]),
        (["parallel=zero3"], ["parallel=zero3_offload"]),
        (["cluster.nodes=2", "parallel=fsdp"], ["parallel=fsdp"]),
        (["parallel=fsdp", "optimizer=sgd"], ["parallel=fsdp"]),
        (
            ["cluster.nodes=8", "parallel=fsdp", "cluster.network_gb_per_second=50"],
            ["cluster.nodes=8", "parallel=fsdp", "cluster.network_gb_per_second=2"],
        ),
        (
            ["cluster.nodes=8", "parallel=hsdp", "parallel.dp_shard=8", "cluster.network_gb_per_second=1"],
            ["cluster.nodes=8", "parallel=fsdp", "cluster.network_gb_per_second=1"],
        ),
        (
            ["parallel=pipeline", "parallel.pp=8", "parallel.pipeline.schedule=interleaved_1f1b"],
            ["parallel=pipeline", "parallel.pp=8", "train.global_batch_size=16"],
        ),
        (["estimate.efficiency=0.7", "parallel=fsdp"], ["estimate.efficiency=0.5", "parallel=fsdp"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_time_moves_the_right_way(faster: list[str], slower: list[str]) -> None:
    first, second = timed(*faster), timed(*slower)
    assert first.total / first.tokens < second.total / second.tokens


def test_an_update_that_multiplies_is_shared_by_all_ranks_and_no_matrix_is() -> None:
    """The update has 1e15 FLOPs, first in matrices of 1e13 each and then in a single one."""
    even = replace(SIZE, update=Work(flops=1e15), update_largest=1e13)
    plain, shared, one = (
        timed("parallel=ddp", size=size).seconds["update"] for size in (SIZE, even, replace(even, update_largest=1e15))
    )
    assert one - plain == pytest.approx(8 * (shared - plain))
    assert shared > plain


def test_time_is_the_sum_of_its_terms_and_mfu_its_share_of_the_peak() -> None:
    found = timed("parallel=tensor_fsdp", "parallel.tp=4", "train.activation_checkpointing=full")
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert set(found.seconds) == {
        "matmuls",
        "around them",
        "recompute",
        "tensor parallel",
        "sharding, gradients",
        "update",
    }
    assert 0.1 < found.mfu < 0.6
    flops = 6 * SIZE.matrices + 12 * SIZE.layers * SIZE.attention * 4096
    assert found.mfu == pytest.approx(found.tokens_per_second_per_gpu * flops / 989.4e12)


def test_products_in_float8_run_at_its_peak_where_every_rank_s_part_divides() -> None:
    """Half of the matrices are in float8; tensor parallel leaves every second one of these in bfloat16."""
    quarter = SIZE.matrices // 4 // 128
    eight = replace(SIZE, float8=((128, quarter // 32 * 32), (48, SIZE.matrices // 4 // 48 // 32 * 32)))
    share = 2 * sum(a * b for a, b in eight.float8) / (2 * SIZE.matrices + 4 * SIZE.layers * SIZE.attention * 4096)
    for words, part in ((("parallel=fsdp",), share), (("parallel=tensor_fsdp", "parallel.tp=2"), share / 2)):
        plain, fast = timed(*words), timed(*words, "precision=fp8", size=eight)
        ratio = fast.seconds["matmuls"] / plain.seconds["matmuls"]
        assert ratio == pytest.approx(1 - part / 2, rel=1e-3)


def test_a_matrix_that_is_cut_too_small_for_blocks_of_32_stays_as_it_is() -> None:
    """Half of its 96 rows are a multiple of 16, as other recipes require, but not of 32."""
    eight = replace(SIZE, float8=((96, SIZE.matrices // 96 // 64 * 64),))
    words = ("parallel=tensor_fsdp", "parallel.tp=2", "cluster.gpu=B200")
    plain = timed(*words)
    rows, blocks = (
        timed(*words, "precision=fp8", f"precision.float8.recipe={recipe}", size=eight)
        for recipe in ("rowwise", "mxfp8")
    )
    assert rows.seconds["matmuls"] < plain.seconds["matmuls"] == blocks.seconds["matmuls"]


def test_what_is_gathered_in_float8_takes_a_byte() -> None:
    """Half of the values are gathered in one byte instead of two, twice a step: a quarter of the bytes is saved."""
    matrix = (4096, SIZE.matrices // 2 // 4096 // 16 * 16)
    words = ("parallel=fsdp", "precision=fp8", "parallel.reshard_after_forward=true")
    wide, narrow = (
        timed(*words, f"precision.float8.all_gather={gathered}", size=replace(SIZE, float8=(matrix,))).seconds
        for gathered in ("false", "true")
    )
    network, group = build_network(load_config(BASE), H100, 8), RankGroup(size=8, per_node=8)
    spared = 2 * network.gather(matrix[0] * matrix[1], group) - 2 * network.gather(0, group)
    difference = wide["sharding, gradients"] - narrow["sharding, gradients"]
    assert difference == pytest.approx(128 * EXPOSED * spared)
    assert wide["matmuls"] == narrow["matmuls"]


def test_frozen_parameters_cost_no_gradient_of_their_own() -> None:
    full, lora = timed("parallel=fsdp"), timed("parallel=fsdp", size=LORA)
    attention = 2 * SIZE.layers * SIZE.attention * 4096
    left = 3 * (2 * LORA.matrices + attention) - 2 * SIZE.matrices
    share = left / (3 * (2 * SIZE.matrices + attention))
    assert lora.seconds["matmuls"] / full.seconds["matmuls"] == pytest.approx(share)
    assert lora.seconds["update"] / full.seconds["update"] == pytest.approx(LORA.trained / SIZE.parameters)
    flops = 4 * SIZE.matrices + 6 * LORA.trained + 12 * SIZE.layers * SIZE.attention * 4096
    assert lora.mfu == pytest.approx(lora.tokens_per_second_per_gpu * flops / 989.4e12)
    # Only the adapters' gradients are reduced, but all parameters are gathered.
    exchanged = {size.frozen: timed("parallel=ddp", size=size).seconds["sharding, gradients"] for size in (SIZE, LORA)}
    assert exchanged[LORA.frozen] / exchanged[0] < 0.01
    whole, sharded = timed("parallel=zero3", size=LORA), timed("parallel=zero1", size=LORA)
    assert whole.seconds["sharding, gradients"] > 10 * sharded.seconds["sharding, gradients"]


@pytest.mark.parametrize(("recompute", "times"), [("none", 2), ("selective", 2.5), ("full", 3)])
def test_four_bit_weights_are_unpacked_at_each_use(recompute: str, times: float) -> None:
    words = ("parallel=fsdp", f"train.activation_checkpointing={recompute}")
    lora, qlora = timed(*words, size=LORA), timed(*words, size=QLORA)
    moved = QLORA.packed_bytes + 2 * QLORA.packed
    assert qlora.seconds["unpacking"] == pytest.approx(128 * times * moved / (0.8 * 3.35e12))
    assert "unpacking" not in lora.seconds
    assert qlora.seconds["sharding, gradients"] < lora.seconds["sharding, gradients"]


def test_group_lies_within_the_node_first() -> None:
    config = load_config([*BASE, "cluster.nodes=4", "parallel=3d_zero1", "parallel.tp=4", "parallel.pp=2"])
    plan = make_plan(config, Machine(gpus=8))
    assert group_of(plan, "tp") == RankGroup(size=4, per_node=4)
    assert group_of(plan, "dp_shard") == RankGroup(size=4, per_node=2)
    assert group_of(plan, "pp") == RankGroup(size=2, per_node=1)
    assert group_of(plan, "dp_shard", "cp") == RankGroup(size=4, per_node=2)


def test_collectives_take_as_long_as_their_slowest_wire() -> None:
    network = Network(link=100e9, network=10e9, host=1e9)
    node, apart, both = RankGroup(8, 8), RankGroup(8, 1), RankGroup(16, 8)
    assert network.gather(8e9, node) == pytest.approx(7e9 / 100e9, rel=1e-3)
    assert network.gather(8e9, apart) == pytest.approx(7e9 / 10e9, rel=1e-3)
    assert network.gather(8e9, both) == pytest.approx(max(7e9 / 100e9, 4e9 / 80e9), rel=1e-3)
    assert network.all_reduce(8e9, node) == 2 * network.gather(8e9, node)
    assert network.all_to_all(8e9, apart) == pytest.approx(7e9 / 10e9, rel=1e-3)
    assert network.gather(8e9, RankGroup(1, 1)) == network.all_to_all(1e9, RankGroup(1, 1)) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Search]:
    words = [*SMALL, "cluster.gpus_per_node=4", "cluster.gpu_memory_gib=2"]
    words.append(f"data.cache_dir={tmp_path_factory.mktemp('cache')}")
    return words, search(load_config(words), FOUR)


def test_there_are_as_many_as_the_chapter_begins_with() -> None:
    found = [*candidates(load_config(BASE), world_size=64, gpus_per_node=8)]
    assert len({one.layout for one in found}) > 90 and len(found) > 1000


def test_every_candidate_is_what_its_words_select() -> None:
    config = load_config(SMALL)
    tried = 0
    seen: set[tuple[str, ...]] = set()
    for candidate in candidates(config, world_size=4, gpus_per_node=4):
        if candidate.layout in seen:
            continue
        seen.add(candidate.layout)
        assert candidate.apply(config) == load_config([*SMALL, *candidate.overrides]), candidate.overrides
        tried += 1
    assert tried > 20


@pytest.mark.parametrize("tuning", rows(zip(("full", "lora", "qlora")), lambda tuning: tuning != "lora"))
def test_best_fit_and_stand_in_order(tuning: str, small: tuple[list[str], Search]) -> None:
    words = [*small[0], f"tuning={tuning}"]
    found = search(load_config(words), FOUR)
    assert len(found.best) == 5
    times = [one.time.total for one in found.best]
    assert times == sorted(times)
    assert len({one.candidate.layout for one in found.best}) == 5
    for one in found.best:
        typed = command(one, found, words).removeprefix("python -m launch ").split()
        config = load_config(typed)
        plan = make_plan(config, FOUR)
        assert plan == one.plan
        again = estimate(config, plan)
        assert again.fits
        assert again.busiest.device_bytes == one.estimate.busiest.device_bytes


BOUNDED = ("ddp", "fsdp", "hsdp parallel.dp_shard=2", "fsdp parallel.reshard_after_forward=false")
BOUNDED += ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.mark.parametrize(
    ("layout", "tuning"),
    rows(
        product(BOUNDED, ("full", "lora")),
        lambda layout, tuning: tuning == "full" or layout in ("fsdp", "zero3"),
    ),
)
def test_bounds_lie_on_both_sides_of_the_estimate(layout: str, tuning: str, small: tuple[list[str], Search]) -> None:
    words = ["train.micro_batch_size=1", *f"parallel={layout}".split(), f"tuning={tuning}"]
    config = load_config([*small[0], *words])
    plan = make_plan(config, FOUR)
    found = estimate(config, plan)
    anatomy = found.profile.anatomy
    above = upper_bytes(config, plan, anatomy.numel)
    assert above is not None
    frozen = sum(anatomy.frozen_tensors(2))
    trained = sum(parameter.numel for parameter in anatomy.parameters() if parameter.trainable)
    below = states_bytes(plan, trained, config.optimizer, frozen=frozen)
    assert 0 <= below <= found.busiest.peak_allocated_bytes <= above


def test_less_memory_leaves_less_choice(small: tuple[list[str], Search]) -> None:
    words, roomy = small
    first = roomy.best[0]
    below = (first.estimate.busiest.device_bytes - 2**20) / 2**30
    tight = search(load_config([*words, f"cluster.gpu_memory_gib={below}"]), FOUR)
    assert tight.best
    assert all(one.estimate.fits for one in tight.best)
    assert tight.too_large is None or not tight.too_large.estimate.fits
    assert first.candidate not in [one.candidate for one in tight.best]
    assert tight.best[0].time.total >= first.time.total


def test_the_command_prints_table_and_json(small: tuple[list[str], Search], capsys: pytest.CaptureFixture[str]) -> None:
    words, found = small
    assert main([*words, "estimate.search=true"]) == 0
    text = capsys.readouterr().out
    assert all(" ".join(one.candidate.overrides) in text for one in found.best)
    assert "assumed: H100-SXM; matmuls at 60% of its peak" in text
    assert main([*words, "estimate.search=true", "estimate.format=json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["overrides"] for one in answer["best"]] == [list(one.candidate.overrides) for one in found.best]
    assert answer["best"][0]["step_seconds"] == pytest.approx(found.best[0].time.total)


def test_nothing_fits(small: tuple[list[str], Search], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small[0], "estimate.search=true", "cluster.gpu_memory_gib=0.5"]) == 3
    assert capsys.readouterr().out.splitlines()[1].startswith("nothing fits. Too large, even with full recompute:")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.micro_batch_size=4"], "estimate.search=true: chooses train.micro_batch_size"),
        (["cluster=cpu"], "estimate.search=true: plans for GPUs"),
        (["model.path=someone/model"], "needs hidden_size and vocab_size"),
    ],
)
def test_what_cannot_be_searched(words: Sequence[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        search(load_config([*SMALL, *words]), Machine(gpus=8))


def test_a_sweep_of_searches_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *SMALL, "tuning=full,lora", "estimate.search=true"]) == 2
    assert "estimate.search=true: ranks the layouts of one configuration" in capsys.readouterr().err


# This checks a behaviour of its own and takes more than a minute of CPU time.
@pytest.mark.nightly
def test_what_stays_gathered_in_one_layout_is_not_held_against_another(small: tuple[list[str], Search]) -> None:
    """FSDP holds an eighth of the 4-bit weights. With resharding off it holds all of them: that measurement must not
    decide about the sharded layout."""
    words = [*small[0], "tuning=qlora", "model.config.num_hidden_layers=16", "model.config.hidden_size=4096"]
    words += ["model.config.intermediate_size=8192", "cluster.gpu_memory_gib=2", "train.global_batch_size=8"]
    found = search(load_config([*words, "cluster.gpus_per_node=8"]), Machine(gpus=8))
    layouts = [one.candidate.layout for one in found.best]
    assert ("parallel=fsdp", "parallel.dp_shard=8") in layouts
    assert not any("parallel.reshard_after_forward=false" in layout for layout in layouts)


def test_recompute_is_only_bought_where_it_is_needed(small: tuple[list[str], Search]) -> None:
    assert small[1].best[0].candidate.keys["train.activation_checkpointing"] is Checkpointing.none


def test_docs_name_every_published_run() -> None:
    text = (Path(__file__).parent.parent / "docs" / "planner.md").read_text()
    for run in RUNS:
        assert f"| {run.name} |" in text


def test_only_a_kernel_that_knows_of_windows_gains_by_them() -> None:
    half = replace(SIZE, spans=(1024, None) * 16)
    long = ["parallel=fsdp", "data.seq_len=32768"]
    masked, whole = timed(*long, size=half), timed(*long)
    flash = timed(*long, "model.attention=flash_attention_2", size=half)
    assert flash.seconds["matmuls"] < whole.seconds["matmuls"] < masked.seconds["matmuls"]
    # With an explicit mask, torch's kernel also computes the masked half of each windowed layer.
    lost, gained = (abs(each.seconds["matmuls"] - whole.seconds["matmuls"]) for each in (masked, flash))
    assert lost / gained == pytest.approx(16384 / (16384 - (1024 - 16)))
    # On a sequence shorter than its window, a layer costs the same as one without a window.
    assert timed("parallel=fsdp", "data.seq_len=512", size=half) == timed("parallel=fsdp", "data.seq_len=512")


def test_a_layouts_command_keeps_what_is_not_searched() -> None:
    words = ["model=tiny", "parallel=fsdp", "parallel.cp=2", "parallel.context_method=gather"]
    assert kept(words) == ["model=tiny", "parallel.context_method=gather"]
