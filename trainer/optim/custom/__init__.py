"""Any optimizer by its path: `optimizer.target=package.module.Class`, with `optimizer.options` as its arguments.

A probe on small tensors finds what the others declare (`probe`): whether updating a piece equals a piece of the update,
the states of each parameter, whether a checkpoint holds all of them, and the memory of an update.

    whole tensors (single, ddp)      every optimizer whose update needs nothing but gradients
    pieces, ZeRO's rows              those that the probe finds to be element by element
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import EngineName
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.common import IMPLEMENTATIONS, average, groups, instead, work  # noqa: F401
from trainer.optim.options import Open
from trainer.optim.protocol import COUNTER, Group, Held, Kept, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

ZEROED = False
USES = frozenset({"weight_decay", "target"})
OPTIONS = Open


def problems(config: Config, view: View) -> Iterator[str]:
    settings = config.optimizer
    if settings.target is None:
        yield "optimizer.name=custom: needs optimizer.target=package.module.Class; give it, or another optimizer"
        return
    from trainer.optim.custom.probe import Refused, examine

    try:
        found = examine(settings)
    except Refused as refused:
        yield from refused.lines
        return
    deepspeed, key = config.parallel.engine is EngineName.deepspeed, f"optimizer.target={settings.target}"
    if (view.is_sharded or deepspeed) and found.coupled:
        yield (
            f"{key}: is not element by element ({found.coupled}), and this layout cuts parameters; use"
            " parallel=single or ddp, or another optimizer"
        )
    elif deepspeed and (found.by_shape or found.others):
        why = f"keeps {found.others} of each parameter" if found.others else "updates vectors otherwise than matrices"
        yield (
            f"{key}: {why}, and ZeRO's partitions are flat rows of many parameters; use parallel=fsdp, hsdp or"
            " tensor_fsdp, which shard as much, or another optimizer"
        )
    if found.draws and view.size(lambda axis: not axis.shards) > 1:
        yield (
            f"{key}: its updates draw random numbers, each process draws others, and so copies of a weight (replicas,"
            " norms under tensor parallel, tied weights of two stages) would become different; use parallel=single or"
            " fsdp, or another optimizer"
        )
    if settings.in_backward:
        yield "optimizer.in_backward=true: optimizer.name=custom updates all parameters at once; set it to false"
    if found.forgotten and config.checkpoint.every:
        yield (
            f"{key}: keeps {found.forgotten}, which a checkpoint does not hold, so that a resumed run would train"
            " otherwise; set checkpoint.every=0, or use another optimizer"
        )


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    from trainer.optim.custom.pieces import build_on_pieces

    return build_on_pieces(grouped, settings)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    if settings.target is None:
        return {}
    from trainer.optim.custom.probe import kept_of

    return {
        kind: Kept(shape=kept.of(parameter.shape), dtype=kept.dtype, host=kept.host)
        for kind, kept in kept_of(settings, len(parameter.shape), dtype).items()
    }


def fresh(built: torch.optim.Optimizer, parameter: torch.Tensor, state: State, *, steps: int) -> dict[str, Any]:
    from trainer.optim.custom.pieces import adopt

    return adopt(built, parameter, common.fresh(built, parameter, state, steps=steps), steps=steps)


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    from trainer.optim.custom.probe import needed_of

    sizes = common.nbytes(held, dtype)
    each, together = needed_of(settings, dtype)
    return int(each * max(sizes, default=0) + together * sum(sizes))


def description(settings: Settings) -> str:
    like = Described(name="", shape=(2**20, 2**20))
    kinds = [kind for kind in state(like, settings, "float32") if kind != COUNTER]
    return f"{settings.target}, states of each parameter: {', '.join(kinds) or 'none'}, as a probe found"
