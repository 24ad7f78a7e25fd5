"""Model FLOPs utilisation: the share of the devices' peak that the model's own arithmetic uses.

The convention is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): recomputed activations do not
count, and the masked upper half of the attention matrix is not subtracted. A layer whose tokens see a window counts the
window. In a mixture of experts only the parameters that a token uses count: the chosen experts, and shared ones. Needs
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema import Config
from trainer import linear
from trainer.plan.devices import Gpu, find_gpu
from trainer.plan.model_fields import attention_spans, attention_width, keys_seen
from trainer.update import ask as ask_update

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from trainer.plan.plan import Plan


def count_parameters(model: PreTrainedModel, *, frozen: bool = False, active: bool = False) -> int:
    """Number of parameters of the whole model, tied ones once, however they are spread over ranks. frozen: count only
    those not trained. active: count only those that a token uses."""
    from trainer.model.layers import owned, values_shape
    from trainer.model.roles import met, routed_parts

    routed = routed_parts(model) if active else {}
    # DeepSpeed leaves an empty parameter, with its true size as an attribute. A DTensor has its own size.
    return sum(
        met(
            getattr(parameter, "ds_numel", None) or values_shape(owner, leaf, parameter).numel(),
            routed.get(id(parameter)),
        )
        for _, owner, leaf, parameter in owned(model)
        if not (frozen and parameter.requires_grad)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """FLOPs of one token. forward: of the whole model. spared: part of the backward that frozen parameters save.
    float8: part of the forward that is multiplied in float8."""

    forward: float
    spared: float = 0.0
    float8: float = 0.0

    @property
    def both(self) -> float:
        """Forward and backward."""
        return 3 * self.forward - self.spared

    def step(self, config: Config) -> float:
        """FLOPs of a step, given how it updates (`trainer.update`)."""
        return ask_update(config.optimizer).passes(config).useful(self.forward, self.both - self.forward)

    def peak(self, config: Config, plan: Plan, gpu: Gpu) -> float | None:
        """FLOP/s of one device, in the plan's compute dtype and in float8, each for its part of a step; None if the
        table of devices has no value."""
        multiplied = linear.eight_bits(config)
        backward = multiplied.backward * self.float8 if multiplied else 0.0
        eight = ask_update(config.optimizer).passes(config).useful(self.float8, backward)
        return gpu.peak_flops(plan.param_dtype, tf32=config.precision.tf32, float8=eight / self.step(config))


def flops(*, matrices: int, attention: int, keys: int, frozen: int = 0, float8: int = 0) -> Flops:
    """A forward takes 2 N + 4 H Q K and a backward twice as much, less 2 for each frozen parameter of N.

    matrices: N, number of parameters that take part in a matmul.
    attention: H * Q, number of heads times head size.
    keys: K, tokens that a token sees, summed over all layers (`keys_seen`): the sequence's length, or the window.
    frozen: number of frozen parameters in N, whose own gradient is not computed.
    float8: number of parameters in N that are multiplied in float8.
    """
    forward = 2.0 * matrices + 4.0 * attention * keys
    return Flops(forward=forward, spared=2.0 * frozen, float8=2.0 * float8)


def counted_flops(
    config: PretrainedConfig, *, parameters: int, seq_len: int, frozen: int = 0, float8: int = 0
) -> Flops:
    """`flops` of a model with this number of parameters: all that a token uses, tied ones once.

    The input embedding is a table look-up without a matmul, unless the output layer uses the same table. Norms, biases
    and learned positions are included: about 1 % in GPT-2, less in larger models.
    """
    text = config.get_text_config()
    embedding = 0 if getattr(text, "tie_word_embeddings", False) else text.vocab_size * text.hidden_size
    fields = text.to_dict()
    return flops(
        matrices=parameters - embedding,
        attention=attention_width(fields),
        keys=keys_seen(attention_spans(fields), seq_len),
        frozen=max(0, frozen - embedding),
        float8=float8,
    )


def model_flops(model: PreTrainedModel, *, seq_len: int) -> Flops:
    """FLOPs of a model as it is trained."""
    from trainer.model.layers import EightBits, owned

    parameters, frozen = count_parameters(model, active=True), count_parameters(model, frozen=True, active=True)
    eight = sum(p.numel() for _, owner, leaf, p in owned(model) if leaf == "weight" and isinstance(owner, EightBits))
    return counted_flops(model.config, parameters=parameters, frozen=frozen, seq_len=seq_len, float8=eight)


def mfu(tokens_per_second: float, *, flops_per_token: float, world_size: int, peak_flops: float) -> float:
    """Between 0 and 1. tokens_per_second: over all ranks. peak_flops: FLOP/s of one device."""
    return tokens_per_second * flops_per_token / (world_size * peak_flops)


def peak_flops(config: Config, plan: Plan, gpu: str | None, flops: Flops) -> float | None:
    """`Flops.peak` of the run's device; None if it is unknown.

    gpu: torch's name for it, None on the CPU. `cluster.gpu` has priority, for cards that torch names differently.
    """
    found = find_gpu(config.cluster.gpu or gpu) if gpu is not None else None
    return flops.peak(config, plan, found) if found else None
