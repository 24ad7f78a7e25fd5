"""What all layouts share: sizes of dtypes, the batch on the device, the optimizer's states and temporaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from configs.choices import DType
from trainer.estimate.profile import Parameter, Profile
from trainer.estimate.timeline import Timeline
from trainer.optim.adamw_8bit import state_bytes
from trainer.plan.plan import Plan

WIDTHS = {DType.float64: 8, DType.float32: 4, DType.bfloat16: 2, DType.float16: 2}
TOKEN_BYTES = 8  # int64
NORM_CHUNK = 65536  # elements per partial sum of torch's multi-tensor norm on CUDA


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a layout works on. host: bytes it adds to the host's memory, by what they are; nvme likewise."""

    profile: Profile
    plan: Plan
    timeline: Timeline
    host: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.plan.device == "cuda"


def place_batch(setting: Setting) -> None:
    """Tokens and labels of all micro-batches of a step are on the device before its first forward; on the CPU they
    are there already."""
    batch = setting.plan.batch
    if setting.gpu:
        for _ in range(2 * batch.gradient_accumulation_steps):
            setting.timeline.allocate("activations", batch.micro_batch_size * batch.seq_len * TOKEN_BYTES)


def step_inputs(plan: Plan, *, first: bool = False, last: bool = False) -> list[int]:
    """Bytes of what the torch engine makes of a step's batches. A context-parallel rank: its slices of tokens, labels
    and positions of each micro-batch. A pipeline's: those that its stages need, joined; first, last: which it holds."""
    batch, cp = plan.batch, plan.degree("cp")
    count = batch.gradient_accumulation_steps
    rows = batch.micro_batch_size * batch.seq_len // cp * TOKEN_BYTES
    slices = [rows] * (3 * count) if cp > 1 else []
    if plan.degree("pp") == 1:
        return slices
    return [*slices, *[rows * count] * (first + last + (cp > 1))]


def place_states(setting: Setting, sizes: Sequence[int]) -> None:
    """The optimizer's states, one set for each parameter of `sizes` bytes."""
    update = setting.profile.update
    whole = int(update.state)
    for size in sizes:
        for _ in range(whole):
            setting.timeline.allocate("optimizer", size)
        setting.timeline.allocate("optimizer", round(size * (update.state - whole)))
        setting.timeline.allocate("optimizer", update.state_constant)


def place_8bit_states(setting: Setting, parameters: Sequence[Parameter]) -> None:
    """States of 8-bit AdamW. The tables that say what codes mean are there from the start, once for all."""
    for parameter in parameters:
        for size in state_bytes(parameter.numel, embedding=parameter.embedding):
            setting.timeline.allocate("optimizer", size)


def place_factored_states(setting: Setting, shapes: Sequence[tuple[int, ...]], width: int) -> None:
    """States of an optimizer that keeps rows and columns of whole matrices, one set for each parameter. width: bytes
    of an element."""
    update = setting.profile.update
    for shape in shapes:
        if len(shape) < 2:
            place_states(setting, [prod(shape) * width])
            continue
        rows, columns = prod(shape[:-1]), prod((*shape[:-2], shape[-1]))
        parts = ((update.state_matrix, prod(shape)), (update.state_row, rows), (update.state_column, columns))
        for ratio, elements in parts:
            setting.timeline.allocate("optimizer", round(ratio * elements * width))
        setting.timeline.allocate("optimizer", update.state_constant)


def update_temporaries(setting: Setting, sizes: Sequence[int]) -> None:
    """What the update needs for a moment. sizes: bytes of the parameters it updates at once, in its order."""
    update = setting.profile.update
    if sizes:
        pairs = zip(sizes, (0, *sizes), strict=False)
        most = max(update.temporary_largest * size + update.temporary_before * before for size, before in pairs)
        workspace = round(update.temporary_all * sum(sizes) + most)
        setting.timeline.free(setting.timeline.allocate("workspace", workspace))
