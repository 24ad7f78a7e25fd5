"""The work of a rank in tests/test_pieces.py."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from tests.support.harness import Overrides, composed, composes
from trainer.engine.torch import TorchEngine
from trainer.make_plan import make_plan
from trainer.model.pieces import join, local_share
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world as join_group


@composes
def wrong_pieces(overrides: Overrides) -> tuple[int, list[str]]:
    """The number of parameters sharded over several ranks, and the names of those that `join` does not restore."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    wrong, divided = [], 0
    with join_group(plan, timeout_minutes=1) as runtime:
        for name, parameter in TorchEngine(config, plan, runtime).named.items():
            assert isinstance(parameter, DTensor)
            whole = torch.arange(float(parameter.numel())).reshape(parameter.shape)
            share = local_share(whole, parameter)
            assert share.shape == parameter.to_local().shape, name
            divided += share.numel() < whole.numel()
            mesh, placements = parameter.device_mesh, parameter.placements
            placed = DTensor.from_local(share, mesh, placements, shape=whole.shape, stride=whole.stride())
            if not torch.equal(join(placed), whole):
                wrong.append(name)
    return divided, wrong
