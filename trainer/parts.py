"""A model on its way through the passes (`trainer.passes`): everything that they find and leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from configs.schema import Config
from trainer.axes.mesh import Meshes
from trainer.axes.pipeline.split import Stage
from trainer.axes.tensor.apply import TensorParallel
from trainer.compile import apply_compile
from trainer.model.loss import cross_entropy_sum
from trainer.model.objective import Objective
from trainer.model.roles import Described
from trainer.moe.balancing import Balancing
from trainer.plan.plan import Plan


@dataclass(kw_only=True, slots=True)
class Parts:
    """A model on its way through the passes; at the end, the module that this rank runs.

    meshes: None in an estimate, where nothing is divided.
    model: the unsplit model, with all its names.
    modules: the model, or this rank's pipeline stages.
    stages: this rank's pipeline stages; empty without a pipeline.
    tensor: one entry for each module; empty without tensor parallel.
    objective: where the loss is computed.
    balancing: of routed experts; None for a dense model.
    compiler: compiles the layers; an estimate has its own.
    described: description of the whole model.
    kinds: tensors that the optimizer keeps for each parameter.
    fill, zero: functions of the engine that give a module its values, and pass the model to DeepSpeed.
    """

    config: Config
    plan: Plan
    meshes: Meshes | None
    model: PreTrainedModel
    fill: Callable[[PreTrainedModel], None] | None = None
    zero: Callable[[Parts], None] | None = None
    compiler: Callable[[nn.Module], None] = apply_compile
    modules: list[PreTrainedModel] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    tensor: list[TensorParallel] = field(default_factory=list)
    described: dict[str, Described] = field(default_factory=dict)
    kinds: dict[str, frozenset[str]] = field(default_factory=dict)
    objective: Objective = field(default_factory=lambda: Objective(loss=cross_entropy_sum))
    balancing: Balancing | None = None
    ddp: DistributedDataParallel | None = None

    def __post_init__(self) -> None:
        self.modules = [self.model]

    def axis(self, *names: str) -> DeviceMesh:
        assert self.meshes is not None
        return self.meshes.dense[names] if names else self.meshes.dense

    @property
    def with_head(self) -> PreTrainedModel | None:
        """This rank's module that returns logits; None for stages that send hidden states."""
        if not self.stages:
            return self.model
        return next((stage.module for stage in self.stages if stage.is_last), None)
