"""Tensor parallel: each rank holds a part of every layer's matrices and computes that part of every layer.

    hidden states, the same on all ranks
      |
      +---> norm --- enter --> [ W1: columns ] --> own heads --> [ W2: rows ] --> leave: sum over the ranks ---+
      |                        \\________________ a region: attention or MLP ________________/                  |
      +--------------------------------------------- residual ----------------------------------------------> (+)

Collectives: two all-reduces of the activation per layer forward (`leave` of attention and of the MLP), two backward
(`enter` of each). With t ranks and n activation bytes each sends 2 (t-1)/t n: fast links only, so tp ranks are
neighbours on a node. Stored per rank: 1/t of every matrix, its gradient and optimizer states, and of the activations
inside regions. Edges and sequence parallel: `regions`, `collectives`. Embedding, head, loss: `vocabulary`.

Every parameter becomes a DTensor on the tp axis: FSDP, checkpoints, norms and optimizers read its placement to see
which dimension is sharded. The computation does not use DTensor: inside a layer each parameter is replaced by this
rank's plain part, the model's own code runs on those, and only the edges of regions communicate with other ranks.

Replicated parameters that see only this rank's heads, or its part of the sequence, get a partial gradient. They are
listed in `partial` and summed once per step, after the last micro-batch: a sum at each backward would count earlier
micro-batches again. All tp ranks need the same data and the same random seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel

from configs.errors import ConfigError, PlanError
from trainer.axes.tensor import vocabulary
from trainer.axes.tensor.adapters import beside_divided, check_adapters, styles_of
from trainer.axes.tensor.collectives import Ranks
from trainer.axes.tensor.derive import derive
from trainer.axes.tensor.plans import (
    PLANS,
    STYLES,
    check_plan,
    check_tensor,
    match,
    share_of,
    split_style,
)
from trainer.axes.tensor.regions import Wiring, run_on_local_parts, wire_layer, wire_module
from trainer.model.build import decoder_layers, held_layers
from trainer.model.layers import is_packed, is_transposed, of_type
from trainer.model.loss import Smoothed, cross_entropy_sum
from trainer.model.peft import plain_name
from trainer.model.roles import innermost

KEY = "parallel.tensor_plan"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallel:
    """Facts about a tensor-parallel model that the training step needs.

    plan: the plan by which it was divided.
    partial: names of the parameters whose gradients are summed over the tp ranks once per step.
    loss: replaces `trainer.model.loss.cross_entropy_sum`; logits hold this rank's part of the vocabulary.
    entries: number of vocabulary entries that a rank scores, or the largest such number.
    first: index of the first entry that this rank scores.
    """

    mesh: DeviceMesh
    plan: Mapping[str, str]
    sequence_parallel: bool
    partial: tuple[str, ...]
    loss: Smoothed
    entries: int
    first: int

    def reduce_partial_gradients(self, model: nn.Module) -> None:
        """Complete the gradients of `partial`, after the last backward of the step. A collective, one in all.

        Works on this rank's piece of the gradient, also after data parallel has scattered it.
        """
        parameters = dict(model.named_parameters())
        pieces = [_local(grad) for name in self.partial if (grad := parameters[name].grad) is not None]
        if not pieces:
            return
        total = torch.cat([piece.reshape(-1) for piece in pieces]).to(self.mesh.device_type)
        dist.all_reduce(total, group=self.mesh.get_group())
        for piece, whole in zip(pieces, total.split([piece.numel() for piece in pieces]), strict=True):
            piece.copy_(whole.view_as(piece))


def tensor_plan(
    model: PreTrainedModel, tp: int, user_plan: Mapping[str, str] | None = None, *, experts_apart: bool = False
) -> dict[str, str]:
    """The plan of a whole model: transformers' or ours for its architecture or, if neither divides anything inside its
    layers, a derived one; overridden by `user_plan`. experts_apart: another axis divides the experts.

    Raises ConfigError for an architecture that no plan can divide, for user entries that match nothing, and for
    adapters that cannot be divided.
    """
    names = [plain_name(name) for name in _names(model)]
    user_plan = dict(user_plan or {})
    problems = [*check_adapters(model, experts_apart=experts_apart), *check_plan(user_plan, KEY)]
    problems += [
        f"{KEY}.{pattern}={style}: {type(model).__name__} has nothing of this name; its modules are printed by"
        " print(model), a layer's number is written *"
        for pattern, style in user_plan.items()
        if not match({pattern: style}, names)
    ]
    if problems:
        raise ConfigError(*problems)
    layers = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    written = {**(model.tp_plan or {}), **PLANS.get(model.config.model_type, {})}
    plan, unknown = _completed(model, written, user_plan, names)
    if (unknown or not _cuts_layers(plan, names, layers)) and (derived := derive(model, tp)):
        plan, unknown = _completed(model, derived, user_plan, names)
    if unknown:
        raise ConfigError(*unknown)
    if not _cuts_layers(plan, names, layers):
        raise ConfigError(
            f"parallel.tp: neither transformers nor this trainer has a tensor-parallel plan for"
            f" {model.config.model_type}, and none can be derived; use parallel.tp=1, or give one:"
            f" parallel.tensor_plan={{'{layers}.*.NAME': colwise, '{layers}.*.NAME': rowwise}}"
        )
    return plan


def _completed(
    model: PreTrainedModel, plan: Mapping[str, str], user_plan: Mapping[str, str], names: list[str]
) -> tuple[dict[str, str], list[str]]:
    """The plan's entries that match the model, with both ends of the vocabulary; and a line for each unknown style."""
    ends = ((model.get_input_embeddings(), "embedding_rowwise"), (model.get_output_embeddings(), "vocabulary"))
    both = {name: style for name, module in model.named_modules() for end, style in ends if module is end}
    whole = {**plan, **both, **user_plan}
    used = {pattern: style for pattern, style in whole.items() if match({pattern: style}, names)}
    return used, [f"{line}, or parallel.tp=1" for line in check_plan(used, KEY)]


def _cuts_layers(plan: Mapping[str, str], names: list[str], layers: str) -> bool:
    inside = match(plan, (name for name in names if name.startswith(f"{layers}.")))
    return any(STYLES[split_style(style)[0]].cut != "none" for style in inside.values())


def apply_tensor_parallel(
    model: PreTrainedModel,
    plan: Mapping[str, str],
    tp_mesh: DeviceMesh,
    *,
    sequence_parallel: bool,
    experts_on_parts: bool = False,
) -> TensorParallel:
    """Divide the parameters (on meta, or real and the same on all ranks) and wire the forwards.

    The model may be one pipeline stage. experts_on_parts: another axis has divided the experts, which get each rank's
    part of the tokens. Raises PlanError if sizes are not divisible, ConfigError for blocks of experts that cannot run
    on parts of the sequence.
    """
    config, size = model.config.get_text_config(), tp_mesh.size()
    if problems := list(check_tensor(config.to_dict(), size, sequence_parallel and size > 1, size)):
        raise PlanError(*problems)
    apart = _divided_elsewhere(model)
    wiring = Wiring(
        ranks=Ranks(tp_mesh.get_group()),
        styles=styles_of(plan, [name for name in _names(model) if not name.startswith(apart)])
        | beside_divided(model, apart),
        apart=apart,
        experts_on_parts=experts_on_parts,
        sequence_parallel=sequence_parallel,
        rope_dim=getattr(config, "qk_rope_head_dim", None),
    )
    _divide_attributes(model, wiring)
    _copy_key_value_heads(model, wiring)
    _distribute(model, wiring, tp_mesh)
    _wire(model, wiring)
    divided_logits = any(split_style(style)[0] == "vocabulary" for style in plan.values())
    loss = vocabulary.cross_entropy_sum(wiring.ranks, _scored(model)) if divided_logits else cross_entropy_sum
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return TensorParallel(
        mesh=tp_mesh,
        plan=plan,
        sequence_parallel=sequence_parallel,
        partial=tuple(sorted(wiring.partial & trained)),
        loss=loss,
        entries=len(vocabulary.part_of(config.vocab_size, wiring.ranks, 0)) if divided_logits else config.vocab_size,
        first=vocabulary.part_of(_scored(model), wiring.ranks).start if divided_logits else 0,
    )


def shares(model: nn.Module, tensor: TensorParallel) -> str:
    """A summary of the division, for the log."""
    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    divided, total = (
        sum(p.numel() for p in parameters if all_of or not p.placements[0].is_replicate()) for all_of in (0, 1)
    )
    along = ", norms and residuals along the sequence" if tensor.sequence_parallel else ""
    return (
        f"tensor parallel: over {tensor.mesh.size()} ranks, {divided / 1e6:.1f} M of {total / 1e6:.1f} M parameters"
        f" divided{along}, {len(tensor.partial)} gradients summed once per step"
    )


def _scored(model: PreTrainedModel) -> int:
    """Number of vocabulary entries that the head scores; an encoder may have another vocabulary (Marian)."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return model.config.get_text_config().vocab_size if weight is None else weight.shape[0]


def _names(model: nn.Module) -> list[str]:
    """Names of all modules and parameters."""
    return [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]


def _divided_elsewhere(model: nn.Module) -> tuple[str, ...]:
    """Modules that another axis has divided, and adapters around them: it runs them, and their inputs and outputs are
    complete."""
    return tuple(
        name
        for name, module in model.named_modules()
        if any(isinstance(parameter, DTensor) for parameter in innermost(module)._parameters.values())
    )


def _divide_attributes(model: nn.Module, wiring: Wiring) -> None:
    """Sizes that the model's code reads from an attribute instead of from its tensor."""
    for name, style in wiring.styles.items():
        word, argument = split_style(style)
        if word != "divide":
            continue
        module = model.get_submodule(name)
        for attribute in argument.split(","):
            value = getattr(module, attribute, None)
            if not isinstance(value, int) or value % wiring.ranks.size:
                raise PlanError(
                    f"{KEY}.{name}={style}: {type(module).__name__}.{attribute} is {value}, which"
                    f" parallel.tp={wiring.ranks.size} does not divide; change either"
                )
            setattr(module, attribute, value // wiring.ranks.size)


def _copy_key_value_heads(model: nn.Module, wiring: Wiring) -> None:
    """Fewer key-value heads than ranks: every rank keeps the whole matrix and computes the one head that its query
    heads need. Ranks that share a head each see a part of its gradient."""
    for name, attention in model.named_modules():
        groups, head_dim = getattr(attention, "num_key_value_groups", None), getattr(attention, "head_dim", None)
        if not isinstance(groups, int) or not isinstance(head_dim, int):
            continue
        for leaf in ("k_proj", "v_proj"):
            projection = getattr(attention, leaf, None)
            # An adapter's second matrix has the projection's columns too.
            for full, matrix in projection.named_modules(prefix=f"{name}.{leaf}") if projection else ():
                if isinstance(matrix, nn.Linear) and wiring.style(full) == "colwise":
                    copies = _copies(full, matrix, head_dim, wiring)
                    attention.num_key_value_groups = groups // copies  # pyright: ignore[reportArgumentType]


def _copies(name: str, projection: nn.Linear, head_dim: int, wiring: Wiring) -> int:
    """Number of ranks that compute each head of this projection. If more than one, it stays undivided, in slices."""
    heads, size = projection.out_features // head_dim, wiring.ranks.size
    if heads % size == 0:
        return 1
    if size % heads:
        raise PlanError(f"parallel.tp={size}: {name} has {heads} key-value heads; use a divisor or a multiple")
    head = wiring.ranks.rank * heads // size
    for leaf, _ in projection.named_parameters():
        wiring.slices[f"{name}.{leaf}"] = slice(head * head_dim, (head + 1) * head_dim)
        wiring.partial.add(f"{name}.{leaf}")
    return size // heads


def _distribute(model: nn.Module, wiring: Wiring, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor. One with two names (tied embeddings) stays one object."""
    made: dict[int, tuple[nn.Parameter, str]] = {}
    places = [
        (module, f"{name}.{leaf}" if name else leaf, leaf, parameter)
        for name, module in model.named_modules()
        if name not in wiring.apart
        for leaf, parameter in list(module.named_parameters(recurse=False))
    ]
    # A second name without its own style, such as that of a head's bias (BERT), is not a contradiction.
    planned = {
        id(parameter): _placement(module, full, leaf, parameter, wiring)
        for module, full, leaf, parameter in reversed(places)
        if _style_of(full, leaf, wiring)
    }
    for module, full, leaf, parameter in places:
        own = _placement(module, full, leaf, parameter, wiring)
        placement = own if _style_of(full, leaf, wiring) else planned.get(id(parameter), own)
        if id(parameter) not in made:
            value = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            # Dividing a packed parameter joins pieces, and a tensor's type may not survive that.
            part = of_type(parameter.detach(), value.to_local())
            value = DTensor.from_local(part, mesh, [placement], shape=value.shape, stride=value.stride())
            made[id(parameter)] = (nn.Parameter(value, requires_grad=parameter.requires_grad), full)
            if is_packed(module, leaf):
                module.divide(value)
        shared, owner = made[id(parameter)]
        if isinstance(shared.data, DTensor) and shared.data.placements[0] != placement:
            raise ConfigError(f"{KEY}: {full} and {owner} are one tied parameter; give both the same cut")
        module._parameters[leaf] = shared


def _style_of(full: str, leaf: str, wiring: Wiring) -> str | None:
    return wiring.styles.get(full) or wiring.styles.get(full.removesuffix(f".{leaf}"))


def _placement(module: nn.Module, full: str, leaf: str, parameter: nn.Parameter, wiring: Wiring) -> Placement:
    packed = module if is_packed(module, leaf) else None
    if full in wiring.slices:
        if packed is not None:
            raise PlanError(
                f"parallel.tp={wiring.ranks.size}: {full} is packed and has fewer key-value heads, which each rank"
                " would take out of it; use a divisor of their number, or tuning=lora"
            )
        return Replicate()
    style = _style_of(full, leaf, wiring)
    share = share_of(style, leaf, parameter.ndim, transposed=is_transposed(module))
    if share.dim is None:
        return Replicate()
    length, pieces = parameter.shape[share.dim], wiring.ranks.size * share.parts
    if length % pieces and STYLES[split_style(style or "")[0]].cut != "vocabulary":
        raise PlanError(
            f"parallel.tp={wiring.ranks.size}: {full} has {length} features to divide, not a multiple of {pieces}"
        )
    if packed is not None and length % (pieces * packed.entries(share.dim)):
        raise PlanError(
            f"parallel.tp={wiring.ranks.size}: {full} has {length // packed.entries(share.dim)} packed blocks in a row,"
            f" not a multiple of {pieces}; use a divisor, parallel=fsdp, or tuning=lora"
        )
    # Torch keeps this placement private, and its own FSDP2 stores parameters in it. Checkpoints must not: for them a
    # piece is one block.
    return _StridedShard(share.dim, split_factor=share.parts) if share.parts > 1 else Shard(share.dim)


def _wire(model: nn.Module, wiring: Wiring) -> None:
    held = held_layers(model)
    inside = {id(module) for layer in held for module in layer.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    for layer in held:
        wire_layer(layer, names[id(layer)], wiring, first=layer is held[0], last=layer is held[-1])
    for name, module in model.named_modules():
        if id(module) in inside or not any(True for _ in module.parameters(recurse=False)):
            continue
        if wiring.style(name) == "embedding_rowwise" and isinstance(module, nn.Embedding):
            module.forward = vocabulary.embedding_forward(module, wiring.ranks)
            # A norm inside sees only this rank's tokens.
            normed = dict(module.named_parameters()).keys() - dict(module.named_parameters(recurse=False)).keys()
            wiring.partial.update(f"{name}.{leaf}" for leaf in normed)
        else:
            wire_module(module, name, wiring, entered=False, cut=None)
        module.forward = run_on_local_parts(module, name, wiring, recurse=False)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
