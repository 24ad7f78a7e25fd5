"""Tensor parallel, the tables: along which side each matrix is divided, by architecture. No torch.

A plan maps names of modules or parameters (`*` stands for a layer's number) to a style. Hugging Face ships such plans
with most decoders; PLANS below adds missing ones, and `parallel.tensor_plan` overrides both.

    y = x W1 W2         W1 cut into columns ("colwise")         W2 cut into rows ("rowwise")

    rank 0              x --[ W1a ]--> a part of the features --[ W2a ]--> a partial sum --\\
    rank 1              x --[ W1b ]--> the other part         --[ W2b ]--> a partial sum ---+--> y on both ranks

The nonlinearity between the two works on single features (an activation) or single heads (attention), so no
communication is needed before the sum. Shoeybi et al. 2019, Megatron-LM. Run-time effect of each style: `apply`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from trainer.model.roles import PACKED, wildcard
from trainer.plan.model_fields import MLP, first, sizes

Side = Literal["output", "input", "first", "vocabulary", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """cut: the divided side of the matrix; `none`: every rank holds all of it. about: one phrase."""

    cut: Side
    about: str


STYLES: dict[str, Style] = {
    "colwise": Style(cut="output", about="output features divided; the result stays divided"),
    "rowwise": Style(cut="input", about="input features divided; the partial results are summed"),
    "packed_colwise": Style(cut="output", about="colwise for N matrices in one, each divided on its own (:N, or 2)"),
    "packed_rowwise": Style(cut="input", about="packed_colwise for stacked experts stored [expert, in, out]"),
    "colwise_gather_output": Style(cut="output", about="colwise, the result gathered"),
    "rowwise_split_input": Style(cut="input", about="rowwise on a whole input"),
    "embedding_rowwise": Style(cut="vocabulary", about="embedding: each rank looks up its part of the vocabulary"),
    "embedding_colwise": Style(cut="input", about="embedding: each rank looks up its part of every vector; gathered"),
    "vocabulary": Style(
        cut="vocabulary", about="head: each rank scores its part of the vocabulary; logits stay divided"
    ),
    "moe_tp_experts": Style(cut="none", about="each rank computes its part of every expert; results are summed"),
    "all_reduce": Style(cut="none", about="a module with divided parameters of its own; its results are summed"),
    "moe_identity_expert": Style(cut="none", about="an expert that returns its input, counted once"),
    "mla_kv_a_proj": Style(cut="none", about="latent attention's first projection, whole on every rank"),
    "replicated_with_grad_allreduce": Style(cut="none", about="whole on every rank, used on this rank's heads"),
    "adapter_before_columns": Style(cut="none", about="whole on every rank, before a colwise part of an adapter"),
    "adapter_after_rows": Style(cut="none", about="whole on every rank, after the sum of an adapter's rowwise part"),
    "channels": Style(cut="first", about="a parameter with one row for each head or channel, divided with them"),
    "divide": Style(cut="none", about="a module's integer attributes (:name,name) are divided by tp"),
    "added_once": Style(cut="none", about="a bias of results that are summed: each rank adds its share of it"),
    "local_params": Style(cut="none", about="holds parameters with entries of their own"),
    "replicate": Style(cut="none", about="whole on every rank"),
}
"""Hugging Face's styles, and ours: `vocabulary`, `channels`, `divide` and ADAPTERS."""

ADAPTERS = {"adapter_before_columns", "adapter_after_rows"}
"""These follow from the layer's plan (`adapters`); no plan contains them."""

ALIASES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}


def _plan(layer: str, *, columns: str, rows: str, divide: tuple[str, str] | None = None) -> dict[str, str]:
    """The plan of a layer's modules. divide: the module with the attributes to divide, and these."""
    styles = {name: "colwise" for name in columns.split()} | {name: "rowwise" for name in rows.split()}
    divided = {divide[0]: f"divide:{divide[1]}"} if divide else {}
    return {f"{layer}.{name}": style for name, style in {**divided, **styles}.items()}


PLANS: dict[str, dict[str, str]] = {
    # transformers' own plan ignores the activation's learned slopes, which see only this rank's features.
    "apertus": {"model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"},
    # transformers' own plan sums each head's results over all values, and then has other heads on each rank.
    "doge": {
        **dict.fromkeys((f"model.layers.*.self_attn.{name}_proj" for name in "qkv"), "colwise_gather_output"),
        "model.layers.*.self_attn.dt_proj": "replicate",
        "model.layers.*.self_attn.o_proj": "rowwise_split_input",
    },
    # Its sparse activation uses the mean and deviation over all features of a gate.
    "gemma3n_text": dict.fromkeys(
        ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj", "model.layers.*.mlp.down_proj"), "replicate"
    ),
    # transformers' own plan passes over the norms of heads that it has with use_qk_norm.
    "glm4_moe": dict.fromkeys(
        (f"model.layers.*.self_attn.{name}_norm" for name in "qk"), "replicated_with_grad_allreduce"
    ),
    "gpt2": {
        "transformer.h.*.attn.c_attn": f"packed_colwise:{PACKED['gpt2']['transformer.h.*.attn.c_attn']}",
        **_plan(
            "transformer.h.*",
            columns="mlp.c_fc",
            rows="attn.c_proj mlp.c_proj",
            divide=("attn", "split_size"),
        ),
    },
    # The columns of gate_up_proj alternate between gate and up: a block of an even number of them is whole pairs.
    "gpt_oss": {
        **_plan(
            "model.layers.*",
            columns="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.sinks",
            rows="self_attn.o_proj",
        ),
        "model.layers.*.mlp.experts": "moe_tp_experts",
        "model.layers.*.mlp.experts.gate_up_proj": "packed_rowwise:1",
        "model.layers.*.mlp.experts.gate_up_proj_bias": "colwise",
        "model.layers.*.mlp.experts.down_proj": "colwise",
        "model.layers.*.mlp.experts.down_proj_bias": "added_once",
    },
    # transformers' own plan divides gate and up, stacked in one matrix, as if they were one.
    "inkling_text": {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise"},
    "inkling2_text": {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise"},
    "stablelm": _plan(
        "model.layers.*",
        columns="self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
        rows="self_attn.o_proj mlp.down_proj",
        divide=("self_attn", "num_heads,num_key_value_heads"),
    ),
}
"""By model_type; entries override those of transformers. Attributes to `divide` are sizes that the model's code reads
instead of the tensor's own shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorShare:
    """How a parameter is divided. dim: the divided dimension, None if every rank holds all of it. parts: number of
    blocks along it, each divided separately (3 for query, key and value in one matrix)."""

    dim: int | None = None
    parts: int = 1


def split_style(style: str) -> tuple[str, str]:
    """A style's name and its argument: "packed_colwise:3" -> ("packed_colwise", "3")."""
    name, _, argument = style.partition(":")
    return ALIASES.get(name, name), argument


def check_plan(plan: Mapping[str, str], key: str) -> Iterator[str]:
    """One line for each unknown style. key: origin of the plan, for the message."""
    known = sorted(STYLES.keys() - ADAPTERS)
    for pattern, style in plan.items():
        name, argument = split_style(style)
        if name not in known:
            yield f"{key}.{pattern}={style}: there is no such style; use one of {', '.join(known)}"
        elif name.startswith("packed"):
            if not re.fullmatch(r"|[1-9]\d*", argument):
                yield f"{key}.{pattern}={style}: takes the number of packed matrices; use {name}:3"
        elif (name == "divide") != bool(argument):
            yield f"{key}.{pattern}={style}: only divide takes names, and it needs one; use divide:num_heads"


def match(plan: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """{name: style} for those names of modules and parameters that the plan mentions."""
    found = {name: next(filter(None, map(plan.get, _patterns(name))), None) for name in names}
    return {name: style for name, style in found.items() if style}


def _patterns(name: str) -> Iterator[str]:
    """The name itself, with `*` for all its numbers, and with `*` for some."""
    yield name
    yield wildcard(name)
    parts = [(word, "*") if word.isdigit() else (word,) for word in name.split(".")]
    if sum(len(choices) - 1 for choices in parts) > 1:
        yield from map(".".join, product(*parts))


def share_of(style: str | None, leaf: str, ndim: int, *, transposed: bool = False) -> TensorShare:
    """How a style divides one parameter of its module.

    leaf: the parameter's own name; a bias has only the output side. transposed: stored [in, out] (GPT-2's Conv1D)
    instead of [out, in]. Stacked experts [expert, out, in] are divided like their matrices.
    """
    name, argument = split_style(style or "replicate")
    cut = STYLES[name].cut
    parts = int(argument or 2) if name.startswith("packed") else 1
    one_sided = ndim == 1 or leaf.endswith("bias")
    if cut == "none" or (one_sided and cut == "input"):
        return TensorShare()
    if cut in ("vocabulary", "first"):
        return TensorShare(dim=0)
    if one_sided:
        return TensorShare(dim=ndim - 1, parts=parts)
    output, input_ = (ndim - 1, ndim - 2) if transposed else (ndim - 2, ndim - 1)
    return TensorShare(dim=output if cut == "output" else input_, parts=parts)


def check_tensor(fields: Mapping[str, Any], tp: int, sequence_parallel: bool, seq_len: int) -> Iterator[str]:
    """Sizes that are not divisible by `tp` ranks, one line each.

    fields: of the Hugging Face config, as far as known. seq_len: tokens of one rank's sequence.
    """
    if tp == 1:
        if sequence_parallel:
            yield (
                "parallel.sequence_parallel=true: divides sequences over the tensor-parallel ranks, parallel.tp is 1;"
                " set it to false"
            )
        return
    known = sizes(fields)
    heads, kv_heads = known.heads, known.key_value_heads
    if heads and heads % tp:
        yield f"parallel.tp={tp}: does not divide the {heads} attention heads; use {_divisors(heads)}"
    elif kv_heads and kv_heads % tp and tp % kv_heads:
        yield (
            f"parallel.tp={tp}: the {kv_heads} key-value heads can be neither divided by it nor copied a whole number"
            f" of times; use a divisor or a multiple of {kv_heads}"
        )
    width = first(fields, MLP)
    if width and width % tp:
        yield f"parallel.tp={tp}: does not divide the MLP's {width} features; use {_divisors(width)}"
    vocabulary = known.vocabulary
    if vocabulary and (tp - 1) * -(-vocabulary // tp) >= vocabulary:
        yield f"parallel.tp={tp}: leaves a rank without any of the {vocabulary} tokens; use a smaller parallel.tp"
    if sequence_parallel and seq_len % tp:
        yield (
            f"data.seq_len={seq_len}: parallel.sequence_parallel=true splits it over parallel.tp={tp};"
            f" use a multiple of {tp}, such as {max(tp, seq_len // tp * tp)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)
