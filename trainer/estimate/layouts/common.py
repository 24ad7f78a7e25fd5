"""The common part of all layouts: their hooks, the batch on the device, the optimizer's states and temporaries."""

# ruff: noqa: B027  (what a layout may leave as it is)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from configs.choices import BYTES, OffloadDevice
from configs.schema import Optimizer
from trainer.axes import CONTEXT, PIPELINE, REPLICATE, TENSOR
from trainer.estimate.profile import Profile
from trainer.estimate.timeline import Handle, Timeline
from trainer.model.roles import Described
from trainer.optim.by_role import updated_separately
from trainer.optim.protocol import Held, Spread
from trainer.optim.table import ask, kept, kept_bytes, paged_bytes
from trainer.plan.plan import Plan
from trainer.update import ask as ask_update
from trainer.update.passes import Passes

TOKEN_BYTES = 8  # int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The model, plan and rank of a layout.

    passes: how often a step runs the model.
    host, nvme: bytes that the layout leaves there, by their kind."""

    profile: Profile
    plan: Plan
    optimizer: Optimizer
    timeline: Timeline
    passes: Passes = field(default_factory=Passes)
    host: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.plan.device == "cuda"

    def place(self, what: str, size: int, where: OffloadDevice) -> None:
        """Count bytes at the place that the plan gives them. A CPU's memory is the host's: nothing is offloaded
        there."""
        if where is OffloadDevice.nvme:
            self.nvme[what] = self.nvme.get(what, 0) + size
        elif where is OffloadDevice.cpu and self.gpu:
            self.host[what] = self.host.get(what, 0) + size
        else:
            self.timeline.allocate(what, size)

    def place_batch(self) -> None:
        """Tokens and labels of all micro-batches of a step are on the device before its first forward; on the CPU they
        are there already."""
        batch = self.plan.batch
        if self.gpu:
            for _ in range(2 * batch.gradient_accumulation_steps):
                self.timeline.allocate("activations", batch.micro_batch_size * batch.seq_len * TOKEN_BYTES)

    @property
    def gradients(self) -> bool:
        """Whether gradients are kept until the whole backward is done; otherwise each is applied as it comes."""
        return ask_update(self.optimizer).GRADIENTS

    def place_states(self, held: Sequence[Held]) -> None:
        """The optimizer's states of these parameters."""
        for one in held:
            for tensor in kept(one.piece, self.optimizer, self.plan.master_dtype):
                self.timeline.allocate("optimizer", tensor.nbytes)
        if shared := paged_bytes([one.piece for one in held], self.optimizer, self.plan.master_dtype):
            self.place("paged optimizer states", shared, OffloadDevice.cpu)

    def states_bytes(self, held: Sequence[Held]) -> int:
        return kept_bytes([one.piece for one in held], self.optimizer, self.plan.master_dtype)

    def averaged(self, held: Sequence[Held]) -> int:
        """Bytes of those parameters that an average replaces while the model is validated."""
        average, dtype = ask(self.optimizer).average(self.optimizer), self.plan.master_dtype
        if average is None:
            return 0
        states = ((one.piece, ask(self.optimizer).state(one.whole, self.optimizer, dtype)) for one in held)
        return sum(piece.numel * BYTES[dtype] for piece, state in states if average.kind in state)

    def update(self, held: Sequence[Held]) -> None:
        """Bytes that the update needs for a moment. held: the matrices that it updates at once, in its order."""
        plan = self.plan
        spread = Spread(ranks=plan.fsdp_size * plan.degree(TENSOR), copies=plan.degree(REPLICATE))
        for group in updated_separately(held, self.optimizer):
            workspace = ask(self.optimizer).temporaries(group, self.optimizer, plan.master_dtype, spread)
            self.timeline.free(self.timeline.allocate("workspace", workspace))


class Layout(ABC):
    """The work of an engine around the model's own code, at the points at which its hooks fire; by default nothing.

    Groups are those of `Anatomy`."""

    def __init__(self, setting: Setting) -> None:
        plan = setting.plan
        self.setting, self.timeline, self.plan = setting, setting.timeline, plan
        self.anatomy = setting.profile.anatomy
        self.param, self.reduce, self.master = (
            BYTES[dtype] for dtype in (plan.param_dtype, plan.reduce_dtype, plan.master_dtype)
        )
        self.last = True
        self.applied: set[str] = set()
        self.applying = False

    def start(self) -> None:
        """Allocate the memory that exists before step 1: here the part that all layouts have."""
        self.timeline.allocate("parameters", self.anatomy.buffers_bytes)
        self.setting.place_batch()

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        self.last = last

    def begin_pass(self, *, applying: bool) -> None:
        """Begin one of several runs of a micro-batch. applying: whether its gradients are applied as they come."""
        self.applying = applying

    def apply_at_once(self, key: str, held: Sequence[Held]) -> None:
        """Update a few parameters inside the backward, one after the other."""
        if not self.applying:
            return
        if key not in self.applied:
            self.applied.add(key)
            self.setting.place_states(held)
        for one in held:
            if len(one.shape) > 1:
                self.setting.update([one])

    def before_forward(self, group: str) -> None: ...

    def after_forward(self, group: str) -> None: ...

    def begin_backward(self) -> None: ...

    def before_backward(self, group: str) -> None: ...

    def after_backward(self, group: str) -> None: ...

    @abstractmethod
    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        """Take a parameter's complete gradient of this micro-batch. The layout owns it from here on."""

    def end_backward(self) -> None: ...

    def end_alone(self) -> None:
        """End a forward that has no backward."""

    def update_each(self, held: Sequence[Held]) -> None:
        """Update the parameters one after the other in a step without gradients."""
        for one in held:
            self.setting.update([one])

    def set_aside(self) -> int:
        """Bytes of trained weights that wait elsewhere on the device while their average is validated."""
        return 0

    @abstractmethod
    def update(self, step: int) -> None:
        """Clip, update the parameters, clear the gradients."""


def step_inputs(plan: Plan, *, first: bool = False, last: bool = False) -> list[int]:
    """Bytes of the tensors that the torch engine makes of a step's batches. A context-parallel rank: its slices of
    tokens, labels and positions of each micro-batch. A pipeline: those that its stages need, joined.

    first, last: the stages that the rank holds."""
    batch, cp = plan.batch, plan.degree(CONTEXT)
    count = batch.gradient_accumulation_steps
    rows = batch.micro_batch_size * batch.seq_len // cp * TOKEN_BYTES
    slices = [rows] * (3 * count) if cp > 1 else []
    if plan.degree(PIPELINE) == 1:
        return slices
    return [*slices, *[rows * count] * (first + last + (cp > 1))]


def flat(elements: int) -> Held:
    """A row into which an engine has flattened its parameters."""
    return Held(whole=Described(name="flat", shape=(elements,)), shape=(elements,))
