"""Start-up check of a tensor-parallel plan: the divided model against the plain one, in miniature and in float64.

A wrong plan seldom crashes: a matrix divided along the wrong side, a gradient summed twice or not at all, trains to a
worse model. So before the run a copy of the architecture with its own ratio of heads and its own switches, shrunk to a
few small layers, one of each kind, is computed both ways as in training on the tensor-parallel ranks: loss and every
gradient must agree. This takes a second or two.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import ConfigError, first_line
from trainer.axes.tensor.apply import apply_tensor_parallel
from trainer.model.loss import cross_entropy_sum
from trainer.model.miniature import first_that_runs
from trainer.process.runtime import gather

log = logging.getLogger(__name__)
Convert = Callable[[PreTrainedModel], None]
TOLERANCE = 1e-5
"""Relative to the largest gradient. Sums in another order differ by 1e-15; architectures that compute norms or routers
in float32 whatever the model's dtype, by 1e-7; a wrong plan by 1e-2 and more."""
ROUNDED = 1e-3
"""For an architecture whose code supports only float32."""
SEED = 1234


def self_check(
    config: PretrainedConfig,
    plan: Mapping[str, str],
    tp_mesh: DeviceMesh,
    *,
    sequence_parallel: bool,
    convert: Convert | None = None,
) -> None:
    """Raise ConfigError, on all tensor-parallel ranks, if the plan changes what the model computes. A collective.

    convert: adds the model's further linear layers to the copy, for example adapters. In the copy everything is
    trained, including the base model of adapters.

    For a plan that `apply_tensor_parallel` has accepted for the model itself: sizes differ here. An architecture whose
    shrunk copy cannot run at all is left unchecked, with a warning.
    """
    devices = [torch.cuda.current_device()] if tp_mesh.device_type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        try:
            plain, (ids, expected) = first_that_runs(
                config, tp_mesh.size(), partial(_computed, tp_mesh), convert=convert
            )
            divided = copy.deepcopy(plain)
            divided.zero_grad()
            tensor_parallel = apply_tensor_parallel(divided, plan, tp_mesh, sequence_parallel=sequence_parallel)
        except Exception as error:  # a miniature config may break any rule of its architecture
            log.warning("tensor plan not checked: a small %s does not run: %s", config.model_type, first_line(error))
            return
        try:
            loss = _loss_and_gradients(divided, ids, tensor_parallel.loss)
            tensor_parallel.reduce_partial_gradients(divided)
            problem = _difference(expected, loss, plain, divided)
        except Exception as error:  # the model's own code, on shapes that do not fit it
            problem = f"the divided model does not run: {first_line(error)}"
    del plain, divided, tensor_parallel
    # Replaced forwards and their modules refer to each other: without a collection the copies would stay.
    gc.collect()
    if found := next(filter(None, gather(problem, tp_mesh.get_group())), None):
        off = "set parallel.sequence_parallel=false or " if sequence_parallel else ""
        raise ConfigError(f"parallel.tensor_plan: wrong for {config.model_type}: {found}; {off}correct the plan")


def _difference(expected: torch.Tensor, loss: torch.Tensor, plain: nn.Module, divided: nn.Module) -> str:
    """The difference in the divided model's results, in words; empty if there is none."""
    exact = {p.dtype for p in plain.parameters()} == {torch.float64}
    tolerance = TOLERANCE if exact else ROUNDED
    if not torch.allclose(loss, expected, rtol=tolerance):
        return f"the loss is {loss.item():.6f} instead of {expected.item():.6f}"
    return _wrong_gradients(plain, divided, tolerance)


def _wrong_gradients(plain: nn.Module, divided: nn.Module, tolerance: float) -> str:
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max() for grad in expected.values())
    wrong = []
    for name, parameter in divided.named_parameters():
        grad = parameter.grad
        if (grad is None) != (name not in expected):
            wrong.append(name)
        elif isinstance(grad, DTensor):
            want = distribute_tensor(expected[name], grad.device_mesh, grad.placements, src_data_rank=None).to_local()
            if want.numel() and (want - grad.to_local()).abs().max() > tolerance * largest:
                wrong.append(name)
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"wrong gradient of {', '.join(wrong[:3])}{more}" if wrong else ""


def _computed(tp_mesh: DeviceMesh, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and the loss; the gradients stay in the model."""
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, 4 * tp_mesh.size())).to(tp_mesh.device_type)
    model.to(tp_mesh.device_type)  # pyright: ignore[reportArgumentType] (transformers hides self)
    return ids, _loss_and_gradients(model, ids, cross_entropy_sum)


def _loss_and_gradients(model: PreTrainedModel, ids: torch.Tensor, loss: Any) -> torch.Tensor:
    # Routers may draw noise.
    torch.manual_seed(SEED)
    total = loss(model(input_ids=ids, use_cache=False).logits, ids.roll(-1, dims=1))
    total.backward()
    return total.detach()
