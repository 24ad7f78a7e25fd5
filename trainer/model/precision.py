"""Which arithmetic: torch's dtypes, autocast, TF32, and the loss scale that float16 needs.

    storage of the parameters   master_dtype      the optimizer updates these, its states have the same dtype
    forward and backward        param_dtype       torch engine: autocast casts where an op is safe in it
    gradients between ranks     reduce_dtype

Engine torch keeps one copy of the parameters, in master_dtype, and casts at each use (autocast): norms, softmax and
loss stay in float32. DeepSpeed keeps a second, unsharded copy in param_dtype and runs every op in it, including norms
(transformers' RMSNorm computes in float32 inside). Losses of the two therefore differ in 16 bit by about 1e-3, and not
in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from configs.choices import DType
from configs.schema import Precision
from trainer.plan.plan import Plan


def torch_dtype(dtype: DType) -> torch.dtype:
    return getattr(torch, str(dtype))


def apply_tf32(precision: Precision) -> None:
    """Allow or forbid TF32 in float32 matmuls, explicitly: torch's own default has changed over versions."""
    torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")


def autocast(plan: Plan) -> AbstractContextManager[object]:
    """Compute in param_dtype if the parameters are stored in another dtype; else change nothing."""
    if plan.param_dtype is plan.master_dtype:
        return nullcontext()
    return torch.autocast(plan.device, dtype=torch_dtype(plan.param_dtype))


class LossScale:
    """The factor that keeps small float16 gradients from vanishing (Micikevicius et al. 2018, section 3.2).

    Dynamic: halved after a step whose gradient overflowed, doubled after `window` steps without overflow. Its input is
    the finiteness of the global gradient norm, which is the same on every rank, so the scale is one number over the
    whole mesh; torch.amp.GradScaler looks at each rank's own gradients.
    """

    def __init__(self, precision: Precision) -> None:
        self.dynamic = precision.loss_scale is None
        self.value = precision.loss_scale_init if precision.loss_scale is None else precision.loss_scale
        self.window = precision.loss_scale_window
        self.good_steps = 0

    def restore(self, value: float | None, good_steps: int | None) -> None:
        """Continue from a saved scale. A constant one stays as configured; None, saved without a scale, means the
        start."""
        if self.dynamic and value is not None:
            self.value, self.good_steps = value, good_steps or 0

    def update(self, *, finite: bool) -> None:
        """Record one step."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == self.window:
            self.value *= 2
            self.good_steps = 0


def build_loss_scale(precision: Precision) -> LossScale | None:
    """A scale for float16, None for dtypes with float32's exponent range."""
    return LossScale(precision) if precision.param_dtype is DType.float16 else None


def export_dtype(param_dtype: DType) -> torch.dtype:
    """Storage dtype of a finished model: 16 bit if it was computed in 16 bit, else float32."""
    return torch_dtype(param_dtype) if param_dtype in (DType.bfloat16, DType.float16) else torch.float32
