"""The plan: what the launcher, the estimator and the trainer agree on.

World size, mesh, batch, dtypes, and what is partitioned and offloaded. `trainer.make_plan` derives it; nothing
downstream derives these again.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.choices import DType, EngineName, OffloadDevice
from trainer.plan.batch import Batch


def is_sharded(mesh: tuple[tuple[str, int], ...]) -> bool:
    """Whether an axis divides the parameters, or the ranks that hold them, on the mesh that there is."""
    return any(size > 1 for axis, size in mesh if axis != "dp_replicate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will happen. `mesh` names its axes from outer to inner, each with its degree. bubble: part of a step that a
    pipeline's ranks spend waiting; 0 without one."""

    device: str
    nodes: int
    gpus_per_node: int
    mesh: tuple[tuple[str, int], ...]
    engine: EngineName
    zero_stage: int
    offload_optimizer: OffloadDevice
    offload_parameters: OffloadDevice
    batch: Batch
    param_dtype: DType
    reduce_dtype: DType
    master_dtype: DType
    reshard_after_forward: bool
    bubble: float
    steps: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def degree(self, axis: str) -> int:
        return dict(self.mesh).get(axis, 1)

    @property
    def data_parallel_size(self) -> int:
        return self.degree("dp_replicate") * self.degree("dp_shard")

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each mesh axis; the innermost axis counts fastest."""
        place: dict[str, int] = {}
        for axis, size in reversed(self.mesh):
            rank, place[axis] = divmod(rank, size)
        return place

    def data_rank(self, rank: int) -> int:
        """This rank's index among the `data_parallel_size` groups that read different sequences."""
        place = self.coordinates(rank)
        return place["dp_replicate"] * self.degree("dp_shard") + place["dp_shard"]

    @property
    def fsdp_size(self) -> int:
        """Ranks that FSDP2 shards a parameter over: those that split a sequence hold the same parameters too."""
        return self.degree("dp_shard") * self.degree("cp")

    @property
    def parameter_shards(self) -> int:
        """Ranks, beside those of `tp` and `pp`, that a parameter is divided over between its uses."""
        if self.engine is EngineName.torch:
            return self.fsdp_size
        return self.degree("dp_shard") if self.zero_stage == 3 else 1

    @property
    def same_data(self) -> int:
        """Ranks that read the same sequences: those of one pipeline, context and tensor-parallel group."""
        return self.world_size // self.data_parallel_size

    @property
    def fully_sharded(self) -> bool:
        """Engine torch: whether FSDP2 holds the parameters. Every layout but single and plain data parallel goes that
        way, with a degree of 1 where nothing is sharded: one path for dtypes, gradients and the optimizer."""
        return is_sharded(self.mesh)

    @property
    def copied(self) -> bool:
        """Engine torch: whether every rank holds the whole model, and DDP averages the gradients."""
        return self.engine is EngineName.torch and not self.fully_sharded and self.data_parallel_size > 1

    def describe(self) -> str:
        """The plan in words, with the batch arithmetic spelled out: printed before step 1 and by `dry_run`."""
        b = self.batch
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh if size > 1) or "1"
        lines = [
            f"world      {self.world_size} = {self.nodes} node(s) x {self.gpus_per_node} process(es) on {self.device};"
            f" mesh {axes}",
            f"engine     {self.engine}{self._partition()}",
            f"batch      {b.global_batch_size} sequences per step = micro_batch_size {b.micro_batch_size}"
            f" x gradient_accumulation_steps {b.gradient_accumulation_steps}"
            f" x data-parallel ranks {b.data_parallel_size}",
            f"tokens     {b.tokens:,} per step = {b.global_batch_size} x seq_len {b.seq_len};"
            f" {b.tokens * self.steps:,} in {self.steps} steps",
            f"precision  compute {self.param_dtype}, gradients reduced in {self.reduce_dtype},"
            f" master {self.master_dtype}",
        ]
        return "\n".join(lines)

    def _partition(self) -> str:
        if self.engine is EngineName.torch:
            return self._torch_layout()
        parts = ["optimizer states", "gradients", "parameters"][: self.zero_stage]
        text = f", ZeRO {self.zero_stage}: {' + '.join(parts)} partitioned over {self.degree('dp_shard')} rank(s)"
        for what, where in (("optimizer", self.offload_optimizer), ("parameters", self.offload_parameters)):
            if where is not OffloadDevice.none:
                text += f"; {what} offloaded to {where}"
        return text

    def _torch_layout(self) -> str:
        if not self.fully_sharded:
            return "" if self.data_parallel_size == 1 else ", every rank holds the whole model (DDP)"
        words = {
            "pp": f"layers over {{}} pipeline ranks (which wait {self.bubble:.0%} of a step)",
            "dp_replicate": "{} replicas",
            "dp_shard": "parameters, gradients and optimizer states sharded over {} (FSDP2)",
            "cp": "sequences split over {}",
            "tp": "matrices split over {}",
        }
        return ", " + ", ".join(words[axis].format(size) for axis, size in self.mesh if size > 1)
