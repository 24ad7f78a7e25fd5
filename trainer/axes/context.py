"""Context parallel, the axis `cp`: sequences are split, and only attention communicates. `sequence` splits them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.choices import Attention, ContextMethod, EngineName
from configs.schema import Config
from trainer.plan.model_fields import config_fields, sizes
from trainer.plan.traffic import LayerWork, Sent
from trainer.plan.views import Axis

# Ranks that split a sequence hold the same parameters: FSDP2 shards over them too.
AXIS = Axis(name="cp", text="sequences split over {}", shards=True)


def sends(config: Config, work: LayerWork) -> Sent:
    """Forward, recompute, and the reverse in the backward: exchange of heads for tokens (query, result, key, value), or
    a gather of keys and values."""
    parallel, times, per_rank = config.parallel, work.forwards + 1, work.tokens / config.parallel.tp
    if parallel.context_method is ContextMethod.ulysses:
        return Sent(how="all_to_all", size_bytes=2 * (work.attention + work.key_value) * per_rank, times=times)
    return Sent(how="gather", size_bytes=2 * work.key_value * per_rank * parallel.cp, times=times)


def problems(config: Config) -> Iterator[str]:
    parallel, cp = config.parallel, config.parallel.cp
    if cp == 1:
        return
    if parallel.engine is EngineName.deepspeed:
        yield (
            f"parallel.cp={cp}: engine deepspeed runs ZeRO over data-parallel ranks only; use parallel=context, which"
            " shards as ZeRO 3"
        )
        return
    method, seq_len = parallel.context_method, config.data.seq_len
    yield from check_context(config_fields(config), cp=cp, tp=parallel.tp, method=method, seq_len=seq_len)
    if config.model.attention not in (Attention.auto, Attention.sdpa):
        yield f"model.attention={config.model.attention}: parallel.cp brings its own attention; use auto"


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
