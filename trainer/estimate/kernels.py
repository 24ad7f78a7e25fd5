"""The kernels that a trace on fake CPU tensors represents: those of the device that the plan is for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils
from transformers.integrations import moe

from trainer.axes.tensor import vocabulary
from trainer.model import head


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's log: it writes a traceback of its own for an operator that fake tensors cannot run."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def as_on_device(*, gpu: bool, exact_attention: bool, documents: bool = False) -> Iterator[None]:
    """Make fake tensors take the code paths of real ones, and CPU tensors those of a GPU if that is wanted.

    documents: positions start at 0 again inside the rows, so that transformers builds a mask between documents.
    """
    attention = F.scaled_dot_product_attention

    def scaled_dot_product_attention(query: torch.Tensor, *args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Any:
        # The flash kernel is left out: the memory-efficient one takes no grouped queries and no float64.
        exact = exact_attention and (kwargs.get("enable_gqa", False) or query.dtype is torch.float64)
        # A fused GPU kernel draws its dropout mask again in the backward; the CPU has no such kernel.
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            return attention(query, *args, dropout_p=dropout_p if exact else 0.0, **kwargs)

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        # A GPU keeps one byte per element as the mask; the CPU keeps the mask in the dtype of x.
        return torch.native_dropout(x, p, training)[0] if training and p else x

    usable = moe._can_use_grouped_mm

    def can_use_grouped_mm(hidden: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> bool:
        # torch's grouped product of the experts knows the shape of its result in bfloat16 alone; in other dtypes the
        # stand-in of transformers has the same inputs and results.
        return weight.dtype is torch.bfloat16 and usable(hidden, weight, offsets)

    def few(all_slices: Callable[..., Iterable[slice]]) -> Callable[..., list[slice]]:
        # All chunks but the last have one size, and from the third on each finds the memory of the second: more add
        # nothing.
        def few_slices(*args: Any) -> list[slice]:
            every = list(all_slices(*args))
            return every if len(every) < 3 else [every[0], every[1], every[1]]

        return few_slices

    with ExitStack() as stack:
        for module in (vocabulary, head):
            stack.enter_context(patch.object(module, "slices", few(module.slices)))
        stack.enter_context(patch.object(moe, "_can_use_grouped_mm", can_use_grouped_mm))
        # Hugging Face builds a mask of seq_len x seq_len for tensors whose values it cannot read. For real tensors it
        # builds one for packed positions only.
        stack.enter_context(patch.object(masking_utils, "is_tracing", lambda *_, **__: False))
        # A decoder that makes a padding mask itself (BART's) makes one of ones. Older versions lack this function.
        stack.enter_context(patch.object(masking_utils, "fast_all", lambda _: True, create=True))
        packed = _packed if documents else _not_packed
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", packed))
        if gpu:
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention))
            stack.enter_context(patch.object(F, "dropout", dropout))
        yield


def _not_packed(position_ids: torch.Tensor) -> None:
    return None


def _packed(position_ids: torch.Tensor) -> torch.Tensor:
    """The numbers that transformers gives the documents of each row, without its check for several documents."""
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
