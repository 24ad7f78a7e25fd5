"""What all layouts share: sizes of dtypes, the batch on the device, the optimizer's states and temporaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from configs.choices import DType, OffloadDevice
from configs.schema import Optimizer
from trainer.axes import CONTEXT, PIPELINE, REPLICATE, TENSOR
from trainer.estimate.profile import Profile
from trainer.estimate.timeline import Timeline
from trainer.model.roles import Described
from trainer.optim.protocol import Held, Spread
from trainer.optim.table import ask, kept, kept_bytes, shared
from trainer.plan.plan import Plan

WIDTHS = {DType.float64: 8, DType.float32: 4, DType.bfloat16: 2, DType.float16: 2}
TOKEN_BYTES = 8  # int64
NORM_CHUNK = 65536  # elements per partial sum of torch's multi-tensor norm on CUDA


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a layout works on. host: bytes it adds to the host's memory, by what they are; nvme likewise."""

    profile: Profile
    plan: Plan
    optimizer: Optimizer
    timeline: Timeline
    host: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.plan.device == "cuda"

    def place(self, what: str, size: int, where: OffloadDevice) -> None:
        """Count bytes where the plan leaves them. A CPU's own memory is the host's: nothing is offloaded there."""
        if where is OffloadDevice.nvme:
            self.nvme[what] = self.nvme.get(what, 0) + size
        elif where is OffloadDevice.cpu and self.gpu:
            self.host[what] = self.host.get(what, 0) + size
        else:
            self.timeline.allocate(what, size)


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
    batch, cp = plan.batch, plan.degree(CONTEXT)
    count = batch.gradient_accumulation_steps
    rows = batch.micro_batch_size * batch.seq_len // cp * TOKEN_BYTES
    slices = [rows] * (3 * count) if cp > 1 else []
    if plan.degree(PIPELINE) == 1:
        return slices
    return [*slices, *[rows * count] * (first + last + (cp > 1))]


def place_states(setting: Setting, held: Sequence[Held]) -> None:
    """The optimizer's states of these parameters."""
    for one in held:
        for tensor in kept(one.piece, setting.optimizer, setting.plan.master_dtype):
            setting.timeline.allocate("optimizer", tensor.nbytes)


def place_shared_states(setting: Setting, held: Sequence[Held]) -> None:
    """What the optimizer keeps once for all parameters, which is there from the start."""
    tables = shared([one.piece for one in held], setting.optimizer, setting.plan.master_dtype)
    setting.timeline.allocate("optimizer", sum(tensor.nbytes for tensor in tables.values()))


def states_bytes(setting: Setting, held: Sequence[Held]) -> int:
    return kept_bytes([one.piece for one in held], setting.optimizer, setting.plan.master_dtype)


def update_temporaries(setting: Setting, held: Sequence[Held]) -> None:
    """What the update needs for a moment. held: the matrices that it updates at once, in its order."""
    plan = setting.plan
    spread = Spread(ranks=plan.fsdp_size * plan.degree(TENSOR), copies=plan.degree(REPLICATE))
    workspace = ask(setting.optimizer).temporaries(held, setting.optimizer, plan.master_dtype, spread)
    setting.timeline.free(setting.timeline.allocate("workspace", workspace))


def flat(elements: int) -> Held:
    """A row into which an engine has flattened its parameters."""
    return Held(whole=Described(name="flat", shape=(elements,)), shape=(elements,))
