"""Model FLOPs utilisation: the share of the devices' peak that the model's own arithmetic takes.

The convention is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): recomputed activations do not
count, nor does it help that the upper half of the attention matrix is masked. Torch-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config
from trainer.plan.devices import find_gpu

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from trainer.plan.plan import Plan


def count_parameters(model: PreTrainedModel, *, frozen: bool = False) -> int:
    """Of the whole model, tied ones once, however they are spread over ranks. frozen: only those not trained."""
    from trainer.model.layers import owned, values_shape

    # What DeepSpeed leaves of a partitioned parameter is empty, and keeps the true size beside. A DTensor knows it.
    return sum(
        getattr(parameter, "ds_numel", None) or values_shape(owner, leaf, parameter).numel()
        for _, owner, leaf, parameter in owned(model)
        if not (frozen and parameter.requires_grad)
    )


def model_flops_per_token(model: PreTrainedModel, *, seq_len: int) -> float:
    """`flops_per_token` of a model as it is trained."""
    parameters, frozen = count_parameters(model), count_parameters(model, frozen=True)
    return flops_per_token(model.config, parameters=parameters, frozen=frozen, seq_len=seq_len)


def flops_per_token(config: PretrainedConfig, *, parameters: int, seq_len: int, frozen: int = 0) -> float:
    """FLOPs of forward and backward for one token: 6 N + 12 L H Q T, less 2 for each frozen parameter of N.

    N: parameters that take part in a matrix product, so without the input embedding (a table look-up), unless the
    output layer uses the same table (norms, biases and learned positions are let in: about 1 % in GPT-2, less in
    larger models); L layers, H heads of size Q, T = seq_len. parameters: all of the model, tied ones once; frozen:
    those not trained, whose own gradient is not computed. For dense decoders: of a mixture of experts it counts every
    expert.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    # Where layers differ, the attribute would ask which layer is meant.
    head_dim = text.to_dict().get("head_dim") or text.hidden_size // heads
    embedding = 0 if getattr(text, "tie_word_embeddings", False) else text.vocab_size * text.hidden_size
    return training_flops_per_token(
        matrices=parameters - embedding,
        layers=text.num_hidden_layers,
        attention=heads * head_dim,
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
