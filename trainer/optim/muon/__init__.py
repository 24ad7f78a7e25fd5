"""Muon: momentum whose matrices are orthogonalised (Jordan 2024), and AdamW for everything else.

    role (`trainer.model.roles`)          updated by    learning rate
    matrix, packed, experts               Muon          optimizer.lr, times a factor of the matrix's shape (adjust_lr)
    embedding, head, router, vector       AdamW         optimizer.options.adamw_lr

A packed weight is orthogonalised matrix by matrix, and so is a stack of experts. Each matrix goes whole to one of the
ranks that hold it (`owners`, `exchange`), so every layout of engine torch computes the same update. Decay and
`match_rms_adamw` are from Liu et al. 2025 (Moonlight, arXiv:2502.16982): with it an update is as large as AdamW's, and
one learning rate works for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, EngineName, Implementation, OptimizerName
from configs.ranges import Range
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer import linear
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.common import ZEROED, average, fresh  # noqa: F401
from trainer.optim.muon.owners import boxes, flops, update_bytes
from trainer.optim.options import KEY, RANGE, read_options
from trainer.optim.protocol import Group, Held, Spread, State, Work
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = (Implementation.fused, Implementation.foreach, Implementation.for_loop)
USES = frozenset({"beta1", "beta2", "eps", "weight_decay"})
FRACTION = {RANGE: Range(least=0, most=1, below=True)}


class AdjustLr(StrEnum):
    original = "original"
    match_rms_adamw = "match_rms_adamw"


class IterationDtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`optimizer.options` of Muon.

    momentum: decay of the momentum.
    nesterov: orthogonalise the gradient moved towards the momentum, not the momentum itself.
    steps: Newton-Schulz iterations.
    coefficients: of the iteration's polynomial a X + b X X^T X + c (X X^T)^2 X.
    adjust_lr: `match_rms_adamw`: an update is as large as AdamW's; `original`: sqrt(max(1, out / in)).
    dtype: of the iteration, independent of the weights' dtype.
    adamw_lr: learning rate of AdamW's parameters; null: optimizer.lr.
    adamw_weight_decay: for the embeddings, the head and the router; null: optimizer.weight_decay.
    """

    momentum: float = field(default=0.95, metadata=FRACTION)
    nesterov: bool = True
    steps: int = field(default=5, metadata={RANGE: Range(least=1, most=100)})
    coefficients: tuple[float, float, float] = field(
        default=(3.4445, -4.7750, 2.0315), metadata={RANGE: Range(least=-100, most=100)}
    )
    adjust_lr: AdjustLr = AdjustLr.match_rms_adamw
    dtype: IterationDtype = IterationDtype.bfloat16
    adamw_lr: float | None = field(default=None, metadata={RANGE: Range(least=0, most=1e38, above=True)})
    adamw_weight_decay: float | None = field(default=None, metadata={RANGE: Range(least=0, most=1e6)})


OPTIONS = Options


def problems(config: Config, view: View) -> Iterator[str]:
    given = config.optimizer.options
    if config.parallel.engine is EngineName.deepspeed:
        yield (
            "optimizer.name=muon: orthogonalises whole matrices, and ZeRO's partitions are flat rows; use"
            " parallel=fsdp, hsdp or tensor_fsdp, which shard as much, or optimizer=adamw"
        )
    if config.optimizer.in_backward:
        yield (
            "optimizer.in_backward=true: muon deals all matrices of a rank out at once, after the backward; use"
            " optimizer=adalomo, or set it to false"
        )
    if not linear.keeps_model(config):
        yield (
            f"{linear.setting(config)}: optimizer.name=muon would orthogonalise an adapter's two factors,"
            " and not the matrix that they make; use optimizer=adamw, or tuning=full"
        )
    if given.get("adjust_lr") == AdjustLr.original and given.get("adamw_lr") is None:
        yield (
            f"{KEY}.adjust_lr=original: optimizer.lr={config.optimizer.lr} is then no learning rate for AdamW, which"
            f" updates embeddings, head and norms; give {KEY}.adamw_lr too (optimizer.lr=0.02 {KEY}.adamw_lr=3e-4)"
        )


def groups(parameters: Sequence[tuple[Described, torch.nn.Parameter]], settings: Settings) -> list[Group]:
    return [Group(name="muon", parameters=tuple(parameters), weight_decay=settings.weight_decay)]


def instead(parameter: Described, settings: Settings) -> Settings | None:
    if parameter.matrices is not None:
        return None
    options = read_options(settings, Options)
    return replace(
        settings,
        name=OptimizerName.adamw,
        options={},
        lr=settings.lr if options.adamw_lr is None else options.adamw_lr,
        weight_decay=settings.weight_decay if options.adamw_weight_decay is None else options.adamw_weight_decay,
    )


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    import torch

    from trainer.optim.muon.update import Muon

    options = asdict(read_options(settings, Options))
    own = {key: options[key] for key in ("momentum", "nesterov", "steps", "coefficients")}
    own |= {"adjust_lr": str(options["adjust_lr"]), "dtype": getattr(torch, options["dtype"])}
    params = [
        {**group.as_torch(settings.lr), **own, "matrices": [about.matrices for about, _ in group.parameters]}
        for group in grouped
    ]
    return Muon(params, replicas=replicas)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    return common.like(parameter, dtype, "momentum_buffer")


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    """The largest round: gathered matrices, this rank's pieces, the iteration's temporaries; and one piece that
    nesterov moves towards the momentum."""
    options = read_options(settings, Options)
    shapes = [shape for one in held for shape in _shapes(one.whole)]
    if not shapes:
        return 0
    width = BYTES[options.dtype]
    needed = update_bytes(
        shapes,
        steps=options.steps,
        itemsize=width,
        sent_itemsize=min(width, BYTES[dtype]),
        ranks=spread.ranks,
        replicas=spread.copies,
    )
    moved = max(rows * columns for rows, columns in shapes) // spread.ranks * BYTES[dtype] if options.nesterov else 0
    return max(needed, moved)


def work(parameter: Described, settings: Settings) -> Work:
    options = read_options(settings, Options)
    total = sum(flops(shape, options.steps) for shape in _shapes(parameter))
    return Work(flops=total, exchanged=2 * parameter.numel * BYTES[options.dtype])


def description(settings: Settings) -> str:
    options = read_options(settings, Options)
    return (
        f"momentum, once the bytes of the matrices; two moments of embeddings, head, router and norms;"
        f" {options.steps} Newton-Schulz iterations in {options.dtype} on whole matrices"
    )


def _shapes(parameter: Described) -> list[tuple[int, int]]:
    """Matrices in a whole parameter."""
    assert parameter.matrices is not None
    sides = [[end - begin for begin, end in box[-2:]] for box in boxes(parameter.shape, parameter.matrices)]
    return [(rows, columns) for rows, columns in sides]
