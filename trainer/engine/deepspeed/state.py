"""State of the DeepSpeed engine: whole for a checkpoint, and divided into each rank's share again.

ZeRO flattens the parameters of a group into one long row and gives each rank a piece of it (stages 1 and 2), or divides
every parameter into W pieces and flattens those that it updates together (stage 3). DeepSpeed's own checkpoints pickle
these pieces; this module reads and writes each parameter's whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.schema import Optimizer as Settings
from trainer.engine.deepspeed.tensor import Cut
from trainer.engine.saved import Dealer, Saved
from trainer.engine.torch_state import check_shape, copy_share, saved_kinds
from trainer.model.pieces import join
from trainer.model.roles import Described
from trainer.optim.protocol import COUNTER
from trainer.optim.table import ask

Cuts = Mapping[str, Cut]


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with a state: all, or only adapters."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def frozen(model: nn.Module, cuts: Cuts) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters without gradient, whole. ZeRO has no master weights of them. A collective."""
    import deepspeed

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                part = parameter.detach().float()
                yield name, join(cuts[name].around(part)) if name in cuts else part.clone()


def save_state(model: nn.Module, zero: Any, cuts: Cuts, *, whole: bool) -> Iterator[tuple[str, torch.Tensor | None]]:
    """As `Engine.state`. zero: `engine.optimizer` of any stage. cuts: of the divided parameters, by name. whole:
    include parameters without gradient."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    dealer, rank, kinds = Dealer(range(dist.get_world_size())), dist.get_rank(), _kinds(zero)
    _link_states(zero)
    for name, parameter in trained(model):
        for kind in ("model", *kinds):
            is_model = kind == "model"
            complete = (
                safe_get_full_fp32_param(parameter) if is_model else safe_get_full_optimizer_state(parameter, kind)
            )
            assert complete is not None, f"{name} is not trained"
            if name in cuts:
                complete = join(cuts[name].around(complete))
            yield f"{kind}/{name}", complete if dealer.owner(complete.nbytes) == rank else None
    for name, complete in frozen(model, cuts) if whole else ():
        yield f"frozen/{name}", complete if dealer.owner(complete.nbytes) == rank else None


def optimizer_steps(zero: Any) -> int:
    """Number of updates that Adam has counted; 0 for an optimizer that does not count."""
    state = next(iter(zero.optimizer.state.values()), {})
    return int(state.get(COUNTER, 0))


@dataclass(frozen=True, slots=True)
class Fresh:
    """Creates the states that the optimizer would have created for a row in its first step, `steps` steps ago."""

    settings: Settings
    steps: int

    def of(self, optimizer: torch.optim.Optimizer, row: torch.Tensor) -> dict[str, Any]:
        chosen, about = ask(self.settings), Described(name="row", shape=tuple(row.shape))
        table = chosen.state(about, self.settings, str(row.dtype).removeprefix("torch."))
        return chosen.fresh(optimizer, row, table, steps=self.steps)


@torch.no_grad()
def load_state(model: nn.Module, zero: Any, saved: Saved, cuts: Cuts, *, stage: int, fresh: Fresh, whole: bool) -> None:
    """Write this rank's share of every tensor into master weights and optimizer, then refresh the compute copies."""
    for name, parameter in model.named_parameters():
        if whole or parameter.requires_grad:
            shape = cuts[name].shape if name in cuts else getattr(parameter, "ds_shape", parameter.shape)
            check_shape(saved, f"{'model' if parameter.requires_grad else 'frozen'}/{name}", shape)
    if whole:
        _load_frozen(model, saved, cuts)
    if stage == 3:
        _load_partitions(dict(trained(model)), zero, saved, fresh)
    else:
        _load_rows(model, zero, saved, cuts, fresh)


def _load_frozen(model: nn.Module, saved: Saved, cuts: Cuts) -> None:
    import deepspeed

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(_part(saved, f"frozen/{name}", cuts.get(name), parameter))


def _load_rows(model: nn.Module, zero: Any, saved: Saved, cuts: Cuts, fresh: Fresh) -> None:
    """Stages 1 and 2: one row per parameter group, of which this rank has a piece."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    kinds = saved_kinds(saved)
    is_bf16 = isinstance(zero, BF16_Optimizer)
    for row in zero.fp32_groups_flat_partition if is_bf16 else zero.single_partition_of_fp32_groups:
        zero.optimizer.state[row] = fresh.of(zero.optimizer, row) if kinds else {}
    _link_states(zero)
    for name, parameter in trained(model):
        safe_set_full_fp32_param(parameter, _part(saved, f"model/{name}", cuts.get(name), parameter))
        for kind in kinds:
            safe_set_full_optimizer_state(parameter, _part(saved, f"{kind}/{name}", cuts.get(name), parameter), kind)
    zero.update_lp_params()


def _part(saved: Saved, key: str, cut: Cut | None, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a saved tensor that tensor parallel gives this rank; all of it without tensor parallel."""
    whole = saved.read(key)
    if cut is None:
        return whole
    part = torch.empty(parameter.shape, dtype=whole.dtype)
    copy_share(cut.around(part), whole)
    return part


def _load_partitions(parameters: dict[str, Any], zero: Any, saved: Saved, fresh: Fresh) -> None:
    """Stage 3: sub-group by sub-group, in the order of DeepSpeed's own step, so that states on NVMe are swapped in and
    out once."""
    names = {parameter.ds_id: name for name, parameter in parameters.items()}
    kinds = saved_kinds(saved)
    # Parameters that stay gathered would keep their old values.
    zero._partition_all_parameters()
    for number, group in enumerate(zero.fp16_groups):
        swapped = zero._swappable_optimizer_subgroup(number)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(number)
        row = zero.fp32_partitioned_groups_flat[number]
        state = fresh.of(zero.optimizer, row) if kinds else {}
        zero.optimizer.state[row] = state
        for parameter in group:
            _, start, length = zero.grad_position[zero.get_param_id(parameter)]
            first = zero._get_param_partition_rank(parameter) * length
            for kind, target in (("model", row.data), *((kind, state[kind]) for kind in kinds)):
                share = saved.read(f"{kind}/{names[parameter.ds_id]}").flatten()[first : first + length]
                # The last rank's piece is padded: W equal pieces may exceed the parameter.
                target[start : start + len(share)].copy_(share)
        zero._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(number)
    zero._post_step(set())


def _link_states(zero: Any) -> None:
    """Stages 1 and 2: link each parameter to its place in the optimizer's states. DeepSpeed does it once, after
    updating the first parameter group; the second group has no states then, and would never be linked."""
    if _kinds(zero) and hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _kinds(zero: Any) -> list[str]:
    """The optimizer's tensors per parameter, in a fixed order; none before its first step."""
    state = next(iter(zero.optimizer.state.values()), {})
    return sorted(kind for kind, value in state.items() if kind != COUNTER and isinstance(value, torch.Tensor))
