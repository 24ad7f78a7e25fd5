"""Tensor parallel, the axis `tp`: matrices divided over ranks, and the collectives between them."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import EngineName
from configs.schema import Config
from trainer.axes.tensor.plans import check_tensor
from trainer.plan.model_fields import config_fields
from trainer.plan.traffic import LayerWork, Sent
from trainer.plan.views import Axis

AXIS = Axis(name="tp", text="matrices split over {}", joint=True)


def sends(config: Config, work: LayerWork) -> Sent:
    """Sums of the hidden states: two per layer forward and two backward; if whole layers are recomputed, the forward's
    again. Sequence parallel sends the same bytes as a gather and a scatter."""
    forwards = 1 if work.partly else work.forwards
    return Sent(how="all_reduce", size_bytes=work.tokens * work.hidden, times=2 * (forwards + 1))


def problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    seq_len = config.data.seq_len // parallel.cp
    yield from check_tensor(config_fields(config), parallel.tp, parallel.sequence_parallel, seq_len)
    if parallel.tp == 1 and parallel.tensor_plan:
        yield "parallel.tensor_plan: says how to cut matrices, but parallel.tp is 1; set tp, or take the plan away"
    if parallel.engine is EngineName.deepspeed and parallel.zero_stage == 3 and parallel.tp > 1:
        yield (
            f"parallel.tp={parallel.tp}: ZeRO 3 gathers whole parameters inside the layers, which tensor parallel has"
            " divided; use parallel=zero2_tensor, or tensor_fsdp, which shards as ZeRO 3"
        )
