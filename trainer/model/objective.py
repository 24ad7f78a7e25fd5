"""Place of the loss: computed from the logits that the model returns, or inside the model, which then returns the loss.

    outside     model(input_ids).logits --> loss                    the caller holds the logits
    inside      model(input_ids, targets=labels).loss               nobody outside does

Inside, a head may compute it in slices (`head`), and a pipeline's engine, which keeps its last stage's result until the
backward, keeps a single number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from trainer.data import IGNORED
from trainer.model.head import call_sliced
from trainer.model.loss import Loss


@dataclass(kw_only=True, slots=True)
class Objective:
    """loss: of logits, in the model's division of the vocabulary.
    inside: whether the model takes `targets`.
    sliced: whether its head computes the loss.
    entries: number of vocabulary entries that it scores, the same on all ranks that compute together; None: all of the
    head's.
    first: index of the first entry that this rank scores."""

    loss: Loss
    inside: bool = False
    sliced: bool = False
    entries: int | None = None
    first: int = 0

    def __call__(self, run: Callable[..., Any], labels: torch.Tensor) -> torch.Tensor:
        """The loss of the result of `run(**more)`, which calls the model with further arguments."""
        if self.inside:
            return run(targets=labels).loss
        return self.loss(run().logits, labels)

    @contextmanager
    def picking(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """While it is open the loss is zero, and the list receives valid labels, and this rank's logits at their
        positions: from a slice of the head, a part of the vocabulary or of the sequence."""
        loss, picked = self.loss, list[tuple[torch.Tensor, torch.Tensor]]()

        def pick(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            counts = labels != IGNORED
            picked.append((labels[counts], logits[counts].detach()))
            return torch.zeros((), dtype=torch.float32, device=logits.device)

        self.loss = pick
        try:
            yield picked
        finally:
            self.loss = loss

    def attach(self, model: nn.Module, *, staged: bool) -> None:
        """Let the model take `targets`, the labels [batch, seq_len]. staged: it is the last pipeline stage, which
        returns the loss itself."""
        inner: Callable[..., Any] = model.forward

        def forward(*args: Any, targets: torch.Tensor | None = None, **kwargs: Any) -> Any:
            run = partial(inner, *args, **kwargs)
            if targets is None:
                return run()
            if self.sliced:
                loss = call_sliced(model, run, targets, self.loss, self.entries)
            else:
                output = run()
                logits = output if isinstance(output, torch.Tensor) else output.logits
                del output
                with torch.autocast(logits.device.type, enabled=False):
                    loss = self.loss(logits, targets)
            return loss if staged else CausalLMOutput(loss=loss)  # pyright: ignore[reportArgumentType]

        model.forward = forward
        self.inside = True
