"""Model FLOPs utilisation: the share of the devices' peak that the model's own arithmetic takes.

The convention is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): recomputed activations do not
count, nor does it help that the upper half of the attention matrix is masked. Of a mixture of experts only the
parameters count that a token meets: the experts that it goes to, and shared ones. Torch-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config
from trainer.plan.devices import find_gpu
from trainer.plan.model_fields import attention_width

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from trainer.plan.plan import Plan


ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers, as configs name them, whose work grows with the square of the sequence."""


def count_parameters(model: PreTrainedModel, *, frozen: bool = False, active: bool = False) -> int:
    """Of the whole model, tied ones once, however they are spread over ranks. frozen: only those not trained. active:
    only those that a token meets."""
    from trainer.model.layers import owned, values_shape
    from trainer.model.roles import met, routed_parts

    routed = routed_parts(model) if active else {}
    # What DeepSpeed leaves of a partitioned parameter is empty, and keeps the true size beside. A DTensor knows it.
    return sum(
        met(
            getattr(parameter, "ds_numel", None) or values_shape(owner, leaf, parameter).numel(),
            routed.get(id(parameter)),
        )
        for _, owner, leaf, parameter in owned(model)
        if not (frozen and parameter.requires_grad)
    )


def model_flops_per_token(model: PreTrainedModel, *, seq_len: int) -> float:
    """`flops_per_token` of a model as it is trained."""
    parameters, frozen = count_parameters(model, active=True), count_parameters(model, frozen=True, active=True)
    return flops_per_token(model.config, parameters=parameters, frozen=frozen, seq_len=seq_len)


def flops_per_token(config: PretrainedConfig, *, parameters: int, seq_len: int, frozen: int = 0) -> float:
    """FLOPs of forward and backward for one token: 6 N + 12 L H Q T, less 2 for each frozen parameter of N.

    N: parameters that take part in a matrix product, so without the input embedding (a table look-up), unless the
    output layer uses the same table (norms, biases and learned positions are let in: about 1 % in GPT-2, less in
    larger models); L layers that have attention, H heads of size Q, T = seq_len. parameters: all that a token meets,
    tied ones once; frozen: those of them not trained, whose own gradient is not computed.
    """
    text = config.get_text_config()
    embedding = 0 if getattr(text, "tie_word_embeddings", False) else text.vocab_size * text.hidden_size
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    return training_flops_per_token(
        matrices=parameters - embedding,
        layers=sum(kind in ATTENTION for kind in kinds) if kinds else text.num_hidden_layers,
        attention=attention_width(text.to_dict()),
        seq_len=seq_len,
        frozen=max(0, frozen - embedding),
    )


def training_flops_per_token(*, matrices: int, layers: int, attention: int, seq_len: int, frozen: int = 0) -> float:
    """`flops_per_token` from the numbers alone. matrices: N; attention: H * Q; frozen: of N."""
    return 6.0 * matrices - 2.0 * frozen + 12.0 * layers * attention * seq_len


def mfu(tokens_per_second: float, *, flops_per_token: float, world_size: int, peak_flops: float) -> float:
    """Between 0 and 1. tokens_per_second: of all ranks together. peak_flops: of one device, in FLOP/s."""
    return tokens_per_second * flops_per_token / (world_size * peak_flops)


def peak_flops(config: Config, plan: Plan, gpu: str | None) -> float | None:
    """FLOP/s of one device for the dtype that the plan computes in; None where it is not known.

    gpu: what torch calls it, None on the CPU. `cluster.gpu` goes before, for a card that torch names in its own way.
    """
    found = find_gpu(config.cluster.gpu or gpu) if gpu is not None else None
    return found.peak_flops(plan.param_dtype, tf32=config.precision.tf32) if found else None
