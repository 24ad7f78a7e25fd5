"""Expert parallel, the axis `ep`: each layer's experts are spread over ranks, and tokens travel to them.

It belongs to its own view of the same ranks (`trainer.plan.views`): the factor of dp_shard x cp x tp that it leaves is
`efsdp`, over which FSDP2 divides each expert's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb, gcd
from typing import TYPE_CHECKING

from configs.choices import EngineName
from configs.schema import Config
from trainer.plan.model_fields import config_fields, experts_of
from trainer.plan.traffic import LayerWork, Sent
from trainer.plan.views import EXPERT, Axis, View

if TYPE_CHECKING:
    from trainer.plan.plan import Plan

AXIS = Axis(name="ep", text="experts over {}", views=(EXPERT,))
SHARD = Axis(name="efsdp", text="each expert's parameters sharded over {}", views=(EXPERT,), shards=True)
REMEDY = "use parallel.ep=1"


def sends(config: Config, work: LayerWork) -> Sent:
    """Forward, recompute, and the reverse in the backward: tokens to the ranks of their experts and back, or a single
    sum if these ranks have the same tokens."""
    ep, tp, times = config.parallel.ep or work.experts, config.parallel.tp, work.forwards + 1
    if ep == tp:
        return Sent(how="all_reduce", size_bytes=work.tokens * work.hidden, times=times)
    rows = expected_rows(ep, work.experts, work.chosen)
    return Sent(how="all_to_all", size_bytes=work.tokens / tp * rows * work.hidden, times=2 * times)


def expected_rows(ranks: int, experts: int, chosen: int) -> float:
    """Average number of ranks that a token goes to, if all experts are equally likely."""
    elsewhere = comb(experts - experts // ranks, chosen) / comb(experts, chosen)
    return ranks * (1 - elsewhere)


def worst_imbalance(ranks: int, experts: int, chosen: int) -> float:
    """A rank's worst load over the average: every token goes to as many of its experts as possible."""
    return ranks * min(chosen, experts // ranks) / chosen


def on_parts(config: Config, plan: Plan) -> bool:
    """Whether each rank of tp routes its own part of every sequence, and sends those tokens alone. Where the ranks of
    ep are those of tp they need the same tokens."""
    return config.parallel.sequence_parallel and plan.degree(AXIS.name) not in (1, config.parallel.tp)


def problems(config: Config) -> Iterator[str]:
    parallel, ep = config.parallel, config.parallel.ep
    if ep == 1:
        return
    said = f"parallel.ep={_word(ep)}"
    if parallel.engine is EngineName.deepspeed:
        yield f"{said}: ZeRO partitions every parameter over all ranks; use parallel=expert, which shards as ZeRO 3"
    fields = config_fields(config)
    experts = experts_of(fields)
    # Without a number, a type that was given by hand may have a default: `apply` sees it.
    if experts is None and fields and "model_type" not in config.model.config:
        yield f"{said}: {fields.get('model_type', 'this model')} has no experts to divide; {REMEDY}, or another model"
    elif experts is not None and ep is not None and experts % ep:
        yield f"{said}: does not divide the {experts} experts of a layer; use {_divisors(experts, ep)}"
    if config.train.compile:
        yield (
            "train.compile=true: with parallel.ep sizes depend on what the router chooses, and cannot be compiled; set"
            f" it to false, or {REMEDY}"
        )


def view(config: Config, dense: View, found: list[str]) -> View | None:
    """The ranks as experts see them; None if experts are not divided. found: receives problems."""
    ep = config.parallel.ep
    shared = dense.size(lambda axis: EXPERT not in axis.views)
    experts = experts_of(config_fields(config))
    if ep is None:
        ep = gcd(shared, experts) if experts else shared
    if ep == 1:
        return None
    if shared % ep:
        found.append(
            f"parallel.ep={ep}: does not divide the {shared} ranks of dp_shard * cp * tp; use"
            f" {_divisors(shared, ep)}, or other degrees"
        )
        return None
    axes = [(axis, size) for axis, size in dense.axes if EXPERT in axis.views]
    return View(EXPERT, (*axes, (SHARD, shared // ep), (AXIS, ep)))


def _word(ep: int | None) -> str:
    return "null" if ep is None else str(ep)


def _divisors(number: int, ep: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, max(64, ep)) + 1) if number % n == 0)
