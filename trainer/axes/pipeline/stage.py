"""A stage as torch's engine drives it, with receive buffers for the micro-batches in flight instead of all of them.

torch 2.15 does that itself, with a new tensor for each receive; then nothing is taken or returned here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import stage as stage_module

Spare = dict[tuple[int, torch.Size], list[torch.Tensor]]
"""Receive buffers that no micro-batch uses, by purpose (0: inputs, 1: gradients) and by shape."""


class EngineStage(PipelineStage):
    """The engine's view of a stage. spare: shared by all stages of this rank. torch itself keeps a buffer for each
    micro-batch of the step."""

    spare: Spare

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with _without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with _without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._take(self.args_recv_info[fwd_chunk_id], 0)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._take(self.grad_recv_info.get(bwd_chunk_id, ()), 1)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if kwargs.get("full_backward", True):
            self._give_back(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._give_back(bwd_chunk_id)

    def _take(self, received: Sequence[Any], kind: int) -> None:
        for info in received:
            buffer: torch.Tensor | None = getattr(info, "buffer", None)
            if buffer is not None and buffer.is_meta:
                spare = self.spare[kind, buffer.shape]
                fits = spare.pop() if spare else torch.empty_like(buffer, device=self.device)
                info.buffer, info.lent = fits.requires_grad_(buffer.requires_grad), True

    def _give_back(self, chunk: int) -> None:
        """In a V, a tensor that a neighbour on this rank has passed on is not borrowed, only released."""
        for kind, received in enumerate((self.args_recv_info[chunk], self.grad_recv_info.get(chunk, ()))):
            for info in received:
                buffer: torch.Tensor | None = getattr(info, "buffer", None)
                if buffer is not None and not buffer.is_meta:
                    info.buffer = torch.empty_like(buffer, device="meta").requires_grad_(buffer.requires_grad)
                    buffer.grad = None
                    if getattr(info, "lent", False):
                        self.spare[kind, buffer.shape].append(buffer)

    def _validate_fwd_outputs(self, outputs: tuple[torch.Tensor, ...]) -> None:
        """Nothing: torch 2.11 would compare the logits with the shape of a stage's message, and they are not sent."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """The exchange that connects neighbours before step 1, in torch 2.11. If a rank holds two consecutive stages (V
        schedules), gloo has no connection to itself."""
        operations = super()._get_init_p2p_neighbors_ops()
        return [operation for operation in operations if operation.group_peer != self.group_rank]


def _without_memory() -> AbstractContextManager[object]:
    """torch makes its buffers on the meta device: they only tell `EngineStage` which buffers it must provide."""
    make: Callable[..., torch.Tensor] = stage_module._make_tensor_from_meta  # pyright: ignore[reportPrivateImportUsage]

    def make_none(meta: Any, device: object) -> torch.Tensor:
        return make(meta, torch.device("meta"))

    return patch.object(stage_module, "_make_tensor_from_meta", make_none)
