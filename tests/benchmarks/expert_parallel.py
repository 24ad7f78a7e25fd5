"""Step time on 4 gloo ranks: expert parallel against FSDP2 alone and against transformers' token exchange.

    python -m tests.benchmarks.expert_parallel

All three train the same tiny qwen3_moe on the same tokens. transformers' exchange (`AllToAllEP`) runs under this
trainer's FSDP2, with the same mesh and the same expert code. The minimum of several steps counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from tests.support.harness import Overrides, composed, composes, run_ranks
from trainer import passes
from trainer.axes.expert.apply import apply_expert_parallel
from trainer.data.build import build_data
from trainer.engine import build_engine
from trainer.make_plan import make_plan
from trainer.model.roles import stack_of
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world
from trainer.run.step import train_step

RANKS, STEPS = 4, 12
MODEL = ["model=tiny", "model.config.model_type=qwen3_moe", "model.config.num_experts=8", "data=synthetic"]
MODEL += [
    "model.config.num_experts_per_tok=4",
    "model.config.hidden_size=256",
    "model.config.moe_intermediate_size=256",
]
MODEL += ["data.seq_len=256", "train.micro_batch_size=4", f"train.steps={STEPS}"]


def main() -> None:
    seconds = {
        "fsdp": run_ranks(RANKS, timed, [*MODEL, "parallel=fsdp"], False, timeout=300)[0],
        "expert": run_ranks(RANKS, timed, [*MODEL, "parallel=expert"], False, timeout=300)[0],
        "expert, transformers' exchange": run_ranks(RANKS, timed, [*MODEL, "parallel=expert"], True, timeout=300)[0],
    }
    print("| layout | seconds per step | of fsdp | of transformers' exchange |\n| --- | ---: | ---: | ---: |")
    for name, value in seconds.items():
        theirs = seconds["expert, transformers' exchange"]
        print(f"| {name} | {value:.3f} | {value / seconds['fsdp']:.2f} | {value / theirs:.2f} |")


@composes
def timed(overrides: Overrides, theirs: bool) -> float:
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    apply: Callable[..., str] = with_their_exchange if theirs else apply_expert_parallel
    with patch.object(passes, "apply_expert_parallel", apply), join_world(plan, timeout_minutes=3) as runtime:
        data = build_data(config, plan, data_rank=plan.data_rank(runtime.rank), vocab_size=256)
        engine, steps, taken = build_engine(config, plan, runtime), data.steps(), []
        for _ in range(STEPS):
            dist.barrier()
            begin = time.perf_counter()
            train_step(engine, next(steps), plan, runtime, 1e-3)
            taken.append(time.perf_counter() - begin)
        engine.close()
        return min(taken[2:])


def with_their_exchange(
    model: PreTrainedModel, mesh: DeviceMesh, *, tensor: DeviceMesh | None, imbalance: float = 1.0
) -> str:
    """Shard the experts with this trainer, and exchange the tokens with transformers."""
    from transformers.distributed.expert_parallel import AllToAllEP

    line = apply_expert_parallel(model, mesh, tensor=tensor, imbalance=imbalance)
    alone = DeviceMesh("cpu", torch.arange(RANKS)[:, None], mesh_dim_names=("ranks", "same"))["same"]
    for module in model.modules():
        if stack_of(module):
            ours: Any = module.forward
            held: Any = SimpleNamespace(forward=ours.keywords["experts"], num_experts=module.num_experts)
            module.forward = AllToAllEP(held, mesh, alone)
    return line


if __name__ == "__main__":
    main()
