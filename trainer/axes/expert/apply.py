"""Expert parallel: each rank of `ep` holds whole experts, and runs them on the tokens of all.

Stacked experts [expert, ..., ...] are divided along their first dimension; transformers' own code computes them, with
grouped matmuls where the device has them. Tokens reach them in one of two ways:

    the ranks of ep have different tokens      `exchange`: all-to-all there and back
    they are the ranks of tp, with the same    every rank runs its experts on those tokens that chose them; one sum over
                                               the ranks, as after any matrix that tensor parallel cuts

In the first case each tensor-parallel rank, which has the same tokens, exchanges a part of them; the results are
joined. Under sequence parallel the whole block runs on a part of each sequence (`on_parts`), and nothing is joined.

Adapters of a stack are not divided by ep: they are thin, and FSDP shards them like every other matrix. Each rank adds
the product of its own experts to its part of the stack. The sum of all ranks' gradients is the gradient of all experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from configs.errors import ConfigError
from trainer.axes.expert.exchange import Experts, balanced_pairs, computed, exchanged, pairs_here
from trainer.axes.tensor.collectives import Ranks
from trainer.model.build import architecture
from trainer.model.layers import of_type
from trainer.model.peft import NAME
from trainer.model.roles import stack_of

Forward = Callable[..., torch.Tensor]


def check_stacks(model: PreTrainedModel, ep: int) -> None:
    """model: the whole model. Raises ConfigError if it has no experts that can be divided."""
    name, counts = architecture(model), {count for _, _, count in _stacks(model)}
    if not counts:
        raise ConfigError(
            f"parallel.ep={ep}: {name} has no experts that transformers keeps in stacks, which alone are divided; use"
            " parallel.ep=1"
        )
    if problems := [
        f"parallel.ep={ep}: does not divide the {count} experts of a layer of {name}; use one of its divisors"
        for count in sorted(counts)
        if count % ep
    ]:
        raise ConfigError(*problems)


def apply_expert_parallel(
    model: PreTrainedModel, mesh: DeviceMesh, *, tensor: DeviceMesh | None, imbalance: float = 1.0
) -> str:
    """Divide the experts (on meta, or real and the same on all ranks) and wire their forwards. Returns a line for the
    log, empty if there are none.

    model: the whole model, or one pipeline stage. mesh: of the axis ep. tensor: of tp, if its ranks have the same
    tokens.
    """
    ranks, same = Ranks(mesh.get_group()), None if tensor is None else Ranks(tensor.get_group())
    shared = same is not None and _members(same) == _members(ranks)
    found, adapters = list(_stacks(model)), _adapters(model)
    for _, module, count in found:
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.shape[:1] == (count,):
                module._parameters[leaf] = _cut(parameter, mesh)
        held = count // ranks.size
        module.num_experts = held  # pyright: ignore[reportArgumentType]
        run = _on_local_parts(module, adapters.get(id(module), ()), slice(ranks.rank * held, (ranks.rank + 1) * held))
        options: dict[str, Any] = {"experts": run, "ranks": ranks, "count": held, "imbalance": imbalance}
        module.forward = partial(_sharing, **options) if shared else partial(_exchanging, same=same, **options)
    if not found:
        return ""
    way = "summed over the ranks of tp" if shared else "exchanged by all-to-all"
    return f"expert parallel: {found[0][2]} experts of a layer over {ranks.size} ranks, their tokens {way}"


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    for name, module in model.named_modules():
        if count := stack_of(module):
            yield name, module, count


def _cut(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    value = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
    part = of_type(parameter.detach(), value.to_local())
    value = DTensor.from_local(part, mesh, [Shard(0)], shape=value.shape, stride=value.stride())
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _adapters(model: nn.Module) -> dict[int, list[Any]]:
    """By the identity of a stack: peft's modules around it, one for each parameter that has an adapter."""
    found: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        if isinstance(getattr(module, "parameter_name", None), str):
            wrapper: Any = module
            found[id(wrapper.get_base_layer())].append(wrapper)
    return found


def _on_local_parts(module: nn.Module, adapters: Sequence[Any], held: slice) -> Experts:
    """The module's forward, during which its parameters are plain tensors and include their adapters' products. They
    are looked up at each call, because sharding replaces them between calls. held: the experts of this rank."""
    inner: Experts = module.forward
    table: dict[str, Any] = module._parameters
    for adapter in adapters:
        # peft's own forward would add the product for all experts.
        adapter.forward = partial(_call_inner, adapter)

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        kept = dict(table)
        try:
            table.update({leaf: p.to_local() for leaf, p in kept.items() if isinstance(p, DTensor)})
            for adapter in adapters:
                left, right, scale = adapter.get_delta_factors(NAME)
                own: torch.Tensor = table[adapter.parameter_name]
                with torch.autocast(own.device.type, enabled=False):
                    table[adapter.parameter_name] = torch.baddbmm(own, left[held], right[held], alpha=scale)
            return inner(hidden, index, weights)
        finally:
            table.update(kept)

    return forward


def _call_inner(adapter: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return adapter.base_layer(*args, **kwargs)


def _sharing(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    experts: Experts,
    ranks: Ranks,
    count: int,
    imbalance: float,
) -> torch.Tensor:
    """For ranks that all have the same tokens."""
    rows, scores = ranks.enter(hidden_states), ranks.enter(top_k_weights)
    number = None
    if isinstance(top_k_index, FakeTensor):
        tokens, chosen = top_k_index.shape
        number = balanced_pairs(tokens, chosen, ranks=ranks.size, count=count, imbalance=imbalance)
    pairs = pairs_here(top_k_index, ranks.rank * count, count, number)
    return ranks.leave(computed(rows, scores, pairs, experts))


def _exchanging(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    same: Ranks | None,
    **options: Any,
) -> torch.Tensor:
    if same is None:
        return exchanged(hidden_states, top_k_index, top_k_weights, **options)
    tokens = hidden_states.shape[0]
    missing = -tokens % same.size
    index = F.pad(top_k_index, (0, 0, 0, missing), value=-1).tensor_split(same.size)[same.rank]
    hidden, weights = (same.split(F.pad(x, (0, 0, 0, missing)), dim=0) for x in (hidden_states, top_k_weights))
    joined = same.join(exchanged(hidden, index, weights, **options), dim=0)
    # FSDP2 accepts no view: an in-place addition to it would bypass its hooks.
    return joined[:tokens].clone() if missing else joined


def _members(ranks: Ranks) -> list[int]:
    return dist.get_process_group_ranks(ranks.group)
