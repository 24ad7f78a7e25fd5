"""For every way of sharding, a parameter that is split over the mesh and joined again is unchanged."""

from __future__ import annotations

import pytest

from tests.support.harness import run_ranks
from tests.support.pieces_case import wrong_pieces


@pytest.mark.parametrize(
    ("model", "keys", "processes"),
    [
        ("tiny_gpt2", ["parallel=tensor_fsdp"], 4),
        ("tiny", ["parallel=tensor_fsdp", "model.config.vocab_size=261"], 4),
        ("tiny", ["parallel=tensor_fsdp", "parallel.dp_replicate=2", "parallel.dp_shard=2"], 8),
        ("tiny", ["parallel=fsdp", "model.config.vocab_size=261"], 4),
        ("tiny", ["parallel=context"], 4),
    ],
)
def test_cut_and_join(model: str, keys: list[str], processes: int) -> None:
    for divided, wrong in run_ranks(processes, wrong_pieces, [f"model={model}", *keys]):
        assert not wrong
        assert divided > 20
