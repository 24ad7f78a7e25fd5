"""float8: the matmuls of linear layers in 8 bits, everything else as in `precision`.

    x  (param_dtype) --> amax --> scale --> e4m3 ---+
    W  (master)      --> amax --> scale --> e4m3 ---+--> _scaled_mm --> y (param_dtype)          forward
    dy (param_dtype) --> amax --> scale --> e5m2 ---+--> _scaled_mm --> dx, dW (param_dtype)     backward, two more

    tensorwise           one scale per tensor             fastest; FSDP2 can gather the weights in 8 bits
    rowwise              one per row of each operand      e4m3 throughout, scales are powers of two
    rowwise_with_gw_hp   as rowwise, dW in param_dtype    most accurate
    mxfp8                one per 32 values of a row       Blackwell's; on the CPU emulated

torchao casts and multiplies, on a GPU and on the CPU alike. Parameters, gradients, states and checkpoints are those of
the plain layer. Excluded are the embedding, the head (`precision.float8.head`), matrices with a dimension on a rank
that 16 does not divide, and experts, which are not linear layers. `float8_layers` has the layers. Micikevicius et al.
2022 (FP8 Formats for Deep Learning, arXiv:2209.05433).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from configs.by_path import reveal_hidden
from configs.choices import DType, EngineName, Recipe
from configs.errors import EnvironmentProblem
from configs.schema import Config, Float8
from trainer.linear import plain
from trainer.linear.common import EightBits, exported, fill, imitate, matmuls, owns, restore  # noqa: F401
from trainer.plan.devices import GPUS, find_gpu

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

KEEPS_MODEL = True
KEY = "precision.float8"
BLOCK = 16
"""The kernels need every dimension of a matmul to be a multiple of this."""
MX_BLOCK, BLACKWELL = 32, ("B2", "B3", "GB")
BACKWARD = {Recipe.rowwise_with_gw_hp: 1}
"""Number of the two matmuls in a layer's backward that are in float8, if not both are."""


def chosen(config: Config) -> bool:
    return config.precision.float8.recipe is not Recipe.none


def problems(config: Config) -> Iterator[str]:
    precision, float8, parallel = config.precision, config.precision.float8, config.parallel
    if not chosen(config):
        unread = {"head": float8.head, "exclude": float8.exclude, "all_gather": float8.all_gather is not None}
        for name, given in unread.items():
            if given:
                value = getattr(float8, name)
                yield (
                    f"{KEY}.{name}={_said(value)}: is for float8 layers, and {KEY}.recipe=none; choose precision=fp8,"
                    " or leave it out"
                )
        return
    named = f"{KEY}.recipe={float8.recipe}"
    if parallel.engine is EngineName.deepspeed:
        yield f"{named}: DeepSpeed flattens and gathers parameters under the layers; use parallel=fsdp"
    if not plain.chosen(config):
        yield f"{named}: converts layers that are trained, tuning={config.tuning.method} freezes them; use tuning=full"
    if precision.param_dtype not in (DType.bfloat16, DType.float32):
        yield (
            f"{named}: multiplies for bfloat16 or float32, precision.param_dtype is {precision.param_dtype}; use"
            " bfloat16"
        )
    block = block_of(float8)
    if config.data.seq_len % (block * parallel.cp):
        share = f" on each of parallel.cp={parallel.cp} ranks" if parallel.cp > 1 else ""
        yield (
            f"data.seq_len={config.data.seq_len}: float8 multiplies along the tokens{share} in steps of {block}; use a"
            f" multiple of {block * parallel.cp}, or precision=bf16"
        )
    if config.optimizer.in_backward:
        yield (
            f"{named}: takes the scales of its weights after a whole update, optimizer.in_backward=true makes it in"
            " pieces; set it to false"
        )
    yield from _check_all_gather(config)
    yield from _check_device(config, named)


def _check_all_gather(config: Config) -> Iterator[str]:
    float8 = config.precision.float8
    if not float8.all_gather:
        return
    if float8.recipe is not Recipe.tensorwise:
        yield (
            f"{KEY}.all_gather=true: a part of a matrix does not know the scales of {KEY}.recipe={float8.recipe}; use"
            " tensorwise, or null"
        )
    elif not _gathered(config):
        yield (
            f"{KEY}.all_gather=true: parallel={config.parallel.preset} gathers no parameters; use parallel=fsdp, or"
            " null"
        )
    elif config.parallel.fsdp.reshard_size is not None:
        yield (
            f"{KEY}.all_gather=true: FSDP2 keeps no part of a weight in float8 for the backward, as"
            f" parallel.fsdp.reshard_size={config.parallel.fsdp.reshard_size} asks; use null"
        )


def _check_device(config: Config, named: str) -> Iterator[str]:
    gpu = find_gpu(config.cluster.gpu) if config.cluster.gpu else None
    if gpu is not None and gpu.float8_flops is None:
        able = ", ".join(gpu.name for gpu in GPUS if gpu.float8_flops is not None)
        yield f"{named}: {gpu.name} has no unit for float8; use precision=bf16, or one of {able}"
    elif gpu is not None and config.precision.float8.recipe is Recipe.mxfp8 and not gpu.name.startswith(BLACKWELL):
        able = ", ".join(gpu.name for gpu in GPUS if gpu.name.startswith(BLACKWELL))
        yield f"{named}: {gpu.name} has no unit for it; use tensorwise or rowwise, or one of {able}"


def layers() -> ModuleType:
    """The module of torchao's layers. Raises EnvironmentProblem."""
    reveal_hidden()
    if find_spec("torchao") is None:
        raise EnvironmentProblem("precision=fp8: needs torchao; pip install 'distributed-training-cookbook[float8]'")
    from trainer.linear import float8_layers

    return float8_layers


def block_of(float8: Float8) -> int:
    """Required divisor of every dimension of a matmul."""
    return MX_BLOCK if float8.recipe is Recipe.mxfp8 else BLOCK


def step_of(config: Config) -> int:
    """Required divisor of every dimension of a matrix, so that each rank's part of it can be multiplied."""
    return block_of(config.precision.float8) * config.parallel.tp


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
    layers().convert_layers(model, config.precision.float8, block=step_of(config), gathered=gathers(config))


def report(model: PreTrainedModel) -> None:
    layers().log_layers(model)


def identity(config: Config) -> dict[str, Any]:
    """Plain parameters are saved: a run may continue in another precision."""
    return {}


def settle(modules: Iterable[nn.Module]) -> None:
    layers().compute_scales(modules)


def description(config: Config) -> str:
    float8 = config.precision.float8
    left = ["embedding", *([] if float8.head else ["head"]), *float8.exclude]
    return (
        f"linear layers in float8, {float8.recipe}; in {config.precision.param_dtype} stay {', '.join(left)} and"
        f" dimensions that {step_of(config)} does not divide"
    )


def traced(config: Config) -> Any:
    float8 = config.precision.float8
    return [str(float8.recipe), float8.head, sorted(float8.exclude), gathers(config)]


def gathers(config: Config) -> bool:
    """Whether weights are cast before FSDP2 gathers them."""
    float8: Float8 = config.precision.float8
    possible = float8.recipe is Recipe.tensorwise and _gathered(config) and config.parallel.fsdp.reshard_size is None
    return possible if float8.all_gather is None else float8.all_gather


def eight_bits(config: Config) -> EightBits:
    backward = BACKWARD.get(config.precision.float8.recipe, 2)
    return EightBits(step=step_of(config), backward=backward, gathered=gathers(config))


def _gathered(config: Config) -> bool:
    """Whether FSDP2 holds the parameters: any axis but replicas has more than one rank, or is still to be filled."""
    parallel = config.parallel
    return any(degree != 1 for degree in (parallel.dp_shard, parallel.cp, parallel.tp, parallel.pp, parallel.ep))


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
