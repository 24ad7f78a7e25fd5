"""Context parallel: what cannot be split along the sequence. Torch-free; `context` does the splitting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.choices import ContextMethod
from trainer.plan.model_fields import sizes


def check_context(fields: Mapping[str, Any], *, cp: int, tp: int, method: ContextMethod, seq_len: int) -> Iterator[str]:
    """Why this model cannot be split along the sequence. fields: of the Hugging Face config, as far as known."""
    if seq_len % cp:
        yield f"parallel.cp={cp}: must divide data.seq_len={seq_len}; use another degree or sequence length"
    heads = sizes(fields).heads
    if heads and method is ContextMethod.ulysses and (heads // tp) % cp:
        yield (
            f"parallel.cp={cp}: ulysses deals {heads // tp} heads (num_attention_heads / tp) out to {cp} ranks, which"
            " does not divide; use another degree, or parallel.context_method=gather"
        )
    if fields.get("attn_logit_softcapping"):
        yield f"parallel.cp={cp}: {fields.get('model_type')} caps its attention logits, no fused kernel does; use 1"
