"""All layers share the process groups of `parallel.fsdp.reshard_size`, each of which has an NCCL communicator. The
setting is refused for experts that are sharded along their features."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.errors import ConfigError
from configs.load import load_config
from trainer.axes.fsdp import apply_fsdp
from trainer.axes.mesh import build_meshes
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, build_model
from trainer.model.roles import describe
from trainer.plan.machine import Machine

RANKS = 4


@pytest.fixture
def no_network() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def groups(*words: str) -> int:
    """Returns the number of process groups that sharding a model creates."""
    config = load_config(["model=tiny", "parallel=fsdp", f"cluster.gpus_per_node={RANKS}", *words])
    plan, model = make_plan(config, Machine()), build_model(config.model, build_hf_config(config.model))
    before = len(dist.distributed_c10d._world.pg_map)  # pyright: ignore[reportPrivateUsage]
    apply_fsdp(model, plan, build_meshes(plan, torch.device("cpu")), describe(model))
    return len(dist.distributed_c10d._world.pg_map) - before  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("no_network")
def test_all_layers_are_gathered_from_the_same_fewer_ranks() -> None:
    assert groups("parallel.fsdp.reshard_size=2") == groups() + 2


@pytest.mark.usefixtures("no_network")
def test_experts_that_are_cut_along_features_stay_with_all_ranks() -> None:
    words = ["model.config.model_type=qwen3_moe", "model.config.num_experts=6", "model.config.num_experts_per_tok=2"]
    words += ["model.config.moe_intermediate_size=32", "parallel.fsdp.reshard_size=2"]
    with pytest.raises(ConfigError, match="reshard_size=2: 4 ranks do not divide the experts"):
        groups(*words)
