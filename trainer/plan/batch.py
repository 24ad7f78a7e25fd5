"""The sequences and tokens of one optimizer update. Torch-free.

global_batch_size = micro_batch_size * gradient_accumulation_steps * dp_replicate * dp_shard
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Train

DEFAULT_MICRO_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Sequences and tokens of one optimizer update."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    data_parallel_size: int
    seq_len: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.data_parallel_size

    @property
    def tokens(self) -> int:
        return self.global_batch_size * self.seq_len


def plan_batch(train: Train, seq_len: int, ranks: int, problems: list[str], *, usual: int) -> BatchPlan:
    """Derive the missing numbers of the batch identity; a remainder is an error. usual: default of
    gradient_accumulation_steps."""
    micro, accumulation, total = train.micro_batch_size, train.gradient_accumulation_steps, train.global_batch_size
    if total is None:
        micro, accumulation = micro or DEFAULT_MICRO_BATCH_SIZE, accumulation or usual
    else:
        accumulation = accumulation or (usual if micro is None else None)
        micro, accumulation = _divide_batch(total, micro, accumulation, ranks, problems)
    return BatchPlan(
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        data_parallel_size=ranks,
        seq_len=seq_len,
    )


def _divide_batch(
    total: int, micro: int | None, accumulation: int | None, ranks: int, problems: list[str]
) -> tuple[int, int]:
    if micro is None:
        accumulation = accumulation or 1
        divisor, product = (
            accumulation * ranks,
            f"gradient_accumulation_steps {accumulation} * {ranks} data-parallel ranks",
        )
        micro = total // divisor
    else:
        divisor, product = micro * ranks, f"micro_batch_size {micro} * {ranks} data-parallel ranks"
        accumulation, derived = accumulation or total // divisor, accumulation is None
        if not derived:
            divisor, product = divisor * accumulation, f"{product} * gradient_accumulation_steps {accumulation}"
            if total != divisor:
                problems.append(
                    f"train.global_batch_size={total}: must equal {product} = {divisor}; give two of the three only"
                )
                return micro, accumulation
    if total % divisor or total < divisor:
        nearest = max(divisor, total // divisor * divisor)
        problems.append(
            f"train.global_batch_size={total}: must be a multiple of {product} = {divisor}; use {nearest}"
            f" or {nearest + divisor}"
        )
    return max(1, micro), max(1, accumulation)
