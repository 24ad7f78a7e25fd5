"""Start-up check of context parallel: does the model treat a slice of a sequence as it does inside the whole?

Slices of a sequence meet inside attention. A state that runs along the sequence, a convolution or a shifted token would
start over on every rank, and so would positions that the model counts itself: the run would train another model. So a
shrunk copy computes with an attention in which each position sees only itself. A change of the first token must then
leave all other positions unchanged, and the second half alone, with its positions, must give the same as in the whole.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

from configs.errors import ConfigError, first_line
from trainer.model.miniature import small_model

log = logging.getLogger(__name__)
NAME = "each_position_alone"
TOLERANCE = 1e-6
"""For float64 logits; real differences are far larger, also if an architecture computes in float32."""


def check_sequence(config: PretrainedConfig, *, cp: int) -> None:
    """Raise ConfigError if anything except attention mixes positions. Computes on the CPU."""
    kind = config.model_type
    remedy = "use parallel.cp=1, with parallel=fsdp and train.activation_checkpointing=full for long sequences"
    try:
        leaked, moved = _differences(config)
    except Exception as error:
        raise ConfigError(
            f"parallel.cp={cp}: nothing shows that a {kind} can be split along its sequences, since a small copy does"
            f" not run: {first_line(error)}; {remedy}"
        ) from None
    if not leaked <= TOLERANCE:
        raise ConfigError(
            f"parallel.cp={cp}: a {kind} carries something along the sequence outside of attention (a state, a"
            f" convolution, an attention of its own), which ends at the border of a slice; {remedy}"
        )
    if not moved <= TOLERANCE:
        raise ConfigError(
            f"parallel.cp={cp}: a {kind} counts positions from the first token that it is given, whatever position_ids"
            f" say, and each slice would begin at 0; {remedy}"
        )


@torch.no_grad()
def _differences(config: PretrainedConfig) -> tuple[float, float]:
    """Largest change of the logits at positions other than a changed token's, and of the second half's without the
    first."""
    AttentionInterface.register(NAME, _alone)
    model = small_model(config)
    model.set_attn_implementation(NAME)
    first, second = torch.arange(3, 11).repeat(2, 1)
    second = second.clone()
    second[0] = 12
    logits = model(input_ids=torch.stack([first, second]), use_cache=False).logits
    assert (logits[0, 0] - logits[1, 0]).abs().max() > TOLERANCE, "the change of a token changes nothing"
    half = model(input_ids=first[None, 4:], position_ids=torch.arange(4, 8)[None], use_cache=False).logits
    moved = (half[0] - logits[0, 4:]).abs().max().item()
    return (logits[0, 1:] - logits[1, 1:]).abs().max().item(), moved


def _alone(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """An attention function in transformers' interface, without attention. The query carries its rotary position."""
    own = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1) + query.mean(dim=-1, keepdim=True)
    return own.transpose(1, 2).contiguous(), None
