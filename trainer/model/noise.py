"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings of a training sample, `train.neftune_alpha`.

    embedding + uniform(-m, m)      m = alpha / sqrt(seq_len * features)      seq_len: of a whole sample, `data.seq_len`

The noise of a sample is drawn from `train.seed` and the sample's position in the run, for the whole sample; a rank with
a slice of the sequence takes its own part. So every layout adds the same noise, on devices of one kind, and a resumed
run adds the same noise as an uninterrupted one. Validation has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import nn

from configs.errors import ConfigError
from trainer.data import Batch
from trainer.data.positions import key_of

ARGUMENT = "sample_numbers"
"""Data of a forward: the samples' positions in the run. The model never sees it."""
PURPOSE = 0x4EF7


@dataclass(kw_only=True, slots=True)
class Noise:
    """alpha, seq_len: see above. slice_of: index and number of the slices of a sequence, of which this rank has one."""

    alpha: float
    seq_len: int
    seed: int
    slice_of: tuple[int, int] = (0, 1)
    numbers: Sequence[int] | None = None

    def take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the forward of the model."""
        numbers = kwargs.pop(ARGUMENT, None)
        self.numbers = None if numbers is None else numbers.tolist()
        return args, kwargs

    def disturb(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """After the forward of the embedding."""
        if not module.training:
            return output
        bound = self.alpha / sqrt(self.seq_len * output.shape[-1])
        if self.numbers is None or len(self.numbers) != len(output):  # an estimate, or a forward before the first step
            return output + torch.empty_like(output).uniform_(-bound, bound)
        length, (place, count) = output.shape[1], self.slice_of
        wide = torch.promote_types(output.dtype, torch.float32)  # the same random numbers for all 16-bit dtypes
        draw, changed = torch.Generator(output.device), torch.empty_like(output)
        for row, number in enumerate(self.numbers):
            draw.manual_seed(key_of(self.seed, PURPOSE, number) >> 1)
            if count == 1 and output.dtype is wide:
                changed[row].uniform_(-bound, bound, generator=draw)
                continue
            whole = torch.empty(length * count, output.shape[-1], dtype=wide, device=output.device)
            whole.uniform_(-bound, bound, generator=draw)
            changed[row] = whole[place * length : (place + 1) * length]
        return output + changed


def add_noise(modules: Sequence[nn.Module], embeds: Sequence[nn.Module], noise: Noise, *, repeated: bool) -> None:
    """modules: the rank's modules. embeds: those of them whose embedding is looked up. repeated: every pipeline stage
    has its own embeddings. Raises ConfigError if there is not exactly one place to add the noise."""
    for module in embeds:
        try:
            embedding = getattr(module, "get_input_embeddings", lambda: None)()
        except NotImplementedError:
            embedding = None
        if not isinstance(embedding, nn.Module) or repeated:
            why = "makes embeddings on every stage of a pipeline" if repeated else "does not say what its embedding is"
            remedy = "use parallel.pp=1, or leave it out" if repeated else "leave it out"
            raise ConfigError(f"train.neftune_alpha={noise.alpha}: {type(module).__name__} {why}; {remedy}")
        embedding.register_forward_hook(noise.disturb)
    for module in modules:
        module.register_forward_pre_hook(noise.take, with_kwargs=True)


def numbered(batch: Batch, *, wanted: bool) -> dict[str, torch.Tensor]:
    """The extra argument of a forward, if there is noise to draw."""
    return {ARGUMENT: batch.numbers} if wanted and batch.numbers is not None else {}
