"""Shared by both engines: the model, made parallel and filled with its values."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from configs.schema import Config
from trainer.axes.mesh import Meshes
from trainer.linear.values import TunedWeights
from trainer.model.causal import build_causal
from trainer.model.filling import WeightSource
from trainer.model.weights import open_weights
from trainer.parts import Parts
from trainer.passes import parallelize
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime

Fill = Callable[[PreTrainedModel, WeightSource], None]


def assemble(
    config: Config,
    plan: Plan,
    runtime: Runtime,
    meshes: Meshes,
    *,
    fill: Fill,
    zero: Callable[[Parts], None] | None = None,
) -> Parts:
    """Build the model and run the passes. A collective. fill, zero: the engine's functions for the passes of these
    names; `fill` gets a module on the meta device and the source of its values."""
    model, seed = build_causal(config), config.train.seed
    weights_of = runtime.agree(lambda: open_weights(config.model, model, seed=seed))
    parts = Parts(
        config=config,
        plan=plan,
        meshes=meshes,
        model=model,
        fill=lambda module: fill(module, TunedWeights(weights_of(module), config.tuning, seed)),
        zero=zero,
    )
    parallelize(parts)
    return parts
