"""Expert parallelism: token exchange, refused combinations, and checkpoints saved and loaded with any number of ranks.

test_parity checks the parity of the layouts; test_memory_measured compares the predicted memory with measurements.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import PlanError
from configs.load import load_config
from launch.estimate import main as memory_estimate
from tests.support.expert_cases import exchange_beside_whole
from tests.support.harness import run_ranks
from tests.support.parity import words
from tests.support.resuming import resume_each, train_and_save
from tests.test_checkpoint_layouts import SAVED, STEPS, apart, train_until_saved
from trainer.axes.expert.exchange import expected_rows
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

MIXTURE = ["model=tiny", "model.config.model_type=mixtral", "model.config.num_local_experts=4"]
# Two ranks hold two experts each. One rank gets no token; the ranks get different numbers; both get every token.
ROUTES = {
    "all to one rank": [[0, 1]] * 4,
    "uneven": [[0, 1], [0, 3], [1, 0], [2, 0], [1, 0]],
    "each to both": [[0, 2], [3, 1], [1, 2]],
}


@pytest.mark.parametrize("routes", ROUTES)
def test_exchanged_tokens_are_computed_as_by_the_whole_module(routes: str) -> None:
    for rank in run_ranks(2, exchange_beside_whole, ROUTES[routes]):
        assert max(rank.result, rank.hidden, rank.weights, rank.experts) < 1e-12, rank
        assert rank.views == [f"model.layers.0.mlp.experts.{leaf}" for leaf in ("down_proj", "gate_up_proj")]


def test_a_token_goes_to_each_rank_once() -> None:
    assert expected_rows(1, 8, 2) == 1
    assert expected_rows(2, 2, 2) == 2
    assert expected_rows(4, 8, 1) == pytest.approx(1)
    # 8 experts form 28 pairs. With 4 ranks, 4 of these pairs lie on one rank.
    assert expected_rows(4, 8, 2) == pytest.approx((4 * 1 + 24 * 2) / 28)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([*MIXTURE, "parallel.ep=3"], "parallel.ep=3: does not divide the 4 experts of a layer; use 1, 2, 4"),
        (
            [*MIXTURE, "parallel.ep=16"],
            r"parallel.ep=16: does not divide the 8 ranks of dp_shard \* cp \* tp; use 1, 2",
        ),
        (
            ["model=tiny", "parallel.ep=2"],
            "parallel.ep=2: llama has no experts to divide; use parallel.ep=1, or another",
        ),
        (
            [*MIXTURE, "parallel.ep=2", "train.compile=true"],
            "train.compile=true: with parallel.ep sizes depend on what",
        ),
        (
            [*MIXTURE, "parallel=zero2", "parallel.ep=2"],
            "parallel.ep=2: ZeRO partitions every parameter over all ranks",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides: list[str], says: str) -> None:
    with pytest.raises(PlanError, match=f"(?m)^{says}"):
        make_plan(load_config(["parallel=fsdp", *overrides]), Machine(gpus=8))


def test_a_model_whose_experts_are_no_stack_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["model=tiny", "model.config.model_type=qwen3", "parallel=expert_fsdp", "cluster=8xh100"]
    assert memory_estimate([*asked, f"data.cache_dir={tmp_path}"]) == 2
    assert "parallel.ep=2: Qwen3ForCausalLM has no experts that transformers keeps in stacks" in capsys.readouterr().err


def test_a_skewed_router_takes_more_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = []
    asked = [*MIXTURE, "parallel=expert_fsdp", "cluster=8xh100", f"data.cache_dir={tmp_path}"]
    for imbalance in (1, 2, 3):
        assert memory_estimate([*asked, f"estimate.imbalance={imbalance}", "estimate.format=json"]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["ranks"][0]["peak_allocated_bytes"])
    assert peaks[1] > 1.02 * peaks[0]
    # At 2, one of the two ranks already receives all tokens, so 3 changes nothing.
    assert peaks[2] == peaks[1]
    assert memory_estimate(asked) == 0
    assert "at worst 2, where all go to experts of one rank" in capsys.readouterr().out


def test_more_ranks_than_experts_hold_equal_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = []
    for nodes in (1, 2):
        asked = [
            *MIXTURE,
            "parallel=fsdp",
            "cluster=8xh100",
            f"cluster.nodes={nodes}",
            "model.config.num_hidden_layers=8",
        ]
        assert memory_estimate([*asked, "estimate.format=json", f"data.cache_dir={tmp_path}"]) == 0
        shares.append(json.loads(capsys.readouterr().out)["ranks"][0]["components"]["parameters_bytes"])
    assert shares[1] < 0.52 * shares[0]


def test_checkpoints_go_on_under_any_number_of_expert_ranks(tmp_path: Path) -> None:
    """Expert-parallel ranks and a single process write checkpoints; other ep sizes, TP and FSDP read them."""

    def asked(layout: str, *keys: str) -> list[str]:
        saving = (f"checkpoint.every={SAVED}", "checkpoint.final=false", "model.config.num_hidden_layers=2")
        return words("mixtral", layout, "fp64", STEPS, *saving, *keys)

    whole = run_ranks(1, train_and_save, [*asked("single"), "checkpoint.every=0"], str(tmp_path / "whole"))[0]
    run_ranks(4, train_until_saved, asked("expert_fsdp"), str(tmp_path / "divided"))
    run_ranks(1, train_until_saved, asked("single"), str(tmp_path / "single"))
    for layout, processes, keys, sources in (
        ("expert", 4, ("parallel.tp=2",), ("divided", "single")),
        ("tensor", 2, (), ("divided",)),
        ("fsdp", 2, (), ("divided",)),
    ):
        folders = [str(tmp_path / source) for source in sources]
        for journal in run_ranks(processes, resume_each, asked(layout, *keys), folders, STEPS - SAVED)[0]:
            # Routers compute in float32, where a different summation order may change the last bit.
            assert apart(journal, whole) <= 1e-8, layout
