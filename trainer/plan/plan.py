"""The plan, which the launcher, the estimator and the trainer share.

It holds world size, mesh, batch, dtypes, partitioning and offload. `trainer.make_plan` derives it; no later code
derives these again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from configs.choices import DType, EngineName, OffloadDevice
from configs.schema import FSDP
from trainer.plan.batch import BatchPlan
from trainer.plan.views import View


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The decided run.

    views: grids of the ranks, the dense one first.
    bubble: share of a step that a pipeline's ranks spend waiting; 0 without one.
    steps: 0 if `epochs` decides, until the data set is known.
    layers: kinds of linear layers, in words; empty for plain ones."""

    device: str
    nodes: int
    gpus_per_node: int
    views: tuple[View, ...]
    engine: EngineName
    zero_stage: int
    offload_optimizer: OffloadDevice
    offload_parameters: OffloadDevice
    batch: BatchPlan
    param_dtype: DType
    reduce_dtype: DType
    master_dtype: DType
    reshard_after_forward: bool
    fsdp: FSDP
    bubble: float
    steps: int
    epochs: float
    layers: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def dense(self) -> View:
        return self.views[0]

    def view(self, name: str) -> View:
        """The view of this name, or the dense one if the plan has no such view."""
        return next((view for view in self.views if view.name == name), self.dense)

    @property
    def mesh(self) -> dict[str, int]:
        """The degree of each axis of the dense view, from outer to inner."""
        return self.dense.degrees

    def degree(self, axis: str) -> int:
        return next((view.degrees[axis] for view in self.views if axis in view.degrees), 1)

    @property
    def data_parallel_size(self) -> int:
        return self.dense.size(lambda axis: axis.reads)

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's index on each axis of the dense view."""
        return self.dense.coordinates(rank)

    def data_rank(self, rank: int) -> int:
        """This rank's index among the `data_parallel_size` groups that read different sequences."""
        return self.dense.place(rank, lambda axis: axis.reads)

    @property
    def fsdp_size(self) -> int:
        """Number of ranks that FSDP2 shards a dense parameter over; ranks that split a sequence hold the same
        parameters."""
        return self.dense.shards

    @property
    def averaged(self) -> int:
        """Number of ranks that hold the same dense parameters, whose gradients DDP or FSDP2 averages."""
        return self.dense.holders

    @property
    def parameter_shards(self) -> int:
        """Number of ranks that a parameter is sharded over between its uses, not counting axes that divide the
        layers."""
        return self.fsdp_size if self.engine is EngineName.torch or self.zero_stage == 3 else 1

    @property
    def same_data(self) -> int:
        """Number of ranks that read the same sequences: a pipeline, context and tensor-parallel group."""
        return self.world_size // self.data_parallel_size

    @property
    def fully_sharded(self) -> bool:
        """Engine torch: whether FSDP2 holds the parameters. It does in every layout except single and plain data
        parallel, with a degree of 1 if nothing is sharded: one path for dtypes, gradients and the optimizer."""
        return self.dense.is_sharded

    @property
    def copied(self) -> bool:
        """Engine torch: whether every rank holds the whole model, and DDP averages the gradients."""
        return self.engine is EngineName.torch and not self.fully_sharded and self.data_parallel_size > 1

    def record(self) -> dict[str, object]:
        """The plan in the form that files keep."""
        plain = {name: value for name, value in asdict(replace(self, views=())).items() if name != "views"}
        return {**plain, "mesh": list(self.mesh.items()), "world_size": self.world_size}

    def describe(self) -> str:
        """The plan as text, with the batch arithmetic: printed before step 1 and by `dry_run`."""
        b = self.batch
        lines = [
            f"world      {self.world_size} = {self.nodes} node(s) x {self.gpus_per_node} process(es) on {self.device};"
            f" mesh {self.dense}",
            f"engine     {self.engine}{self._partition()}",
            f"batch      {b.global_batch_size} sequences per step = micro_batch_size {b.micro_batch_size}"
            f" x gradient_accumulation_steps {b.gradient_accumulation_steps}"
            f" x data-parallel ranks {b.data_parallel_size}",
            self.tokens(),
            f"precision  compute {self.param_dtype}, gradients reduced in {self.reduce_dtype},"
            f" master {self.master_dtype}",
        ]
        if self.layers:
            lines.append(f"layers     {self.layers}")
        return "\n".join(lines)

    def tokens(self) -> str:
        """The line that changes once the data gives the number of steps."""
        b = self.batch
        return f"tokens     {b.tokens:,} per step = {b.global_batch_size} x seq_len {b.seq_len}; {self._length()}"

    def _length(self) -> str:
        if self.steps:
            return f"{self.batch.tokens * self.steps:,} in {self.steps} steps"
        return f"as many steps as {self.epochs:g} epoch{'' if self.epochs == 1 else 's'} of the data take"

    def _partition(self) -> str:
        if self.engine is EngineName.torch:
            return self._torch_layout()
        parts = ["optimizer states", "gradients", "parameters"][: self.zero_stage]
        text = f", ZeRO {self.zero_stage}: {' + '.join(parts)} partitioned over {self.data_parallel_size} rank(s)"
        for what, where in (("optimizer", self.offload_optimizer), ("parameters", self.offload_parameters)):
            if where is not OffloadDevice.none:
                text += f"; {what} offloaded to {where}"
        return text

    def _torch_layout(self) -> str:
        if not self.fully_sharded:
            return "" if self.data_parallel_size == 1 else ", every rank holds the whole model (DDP)"
        every = {axis.name: (axis, size) for view in self.views for axis, size in view.axes if size > 1}
        said = (axis.text.format(size, bubble=self.bubble) for axis, size in every.values())
        return ", " + ", ".join(said)
