"""Tracing of a profile that is not on disk: the model is built, and a few of its layers are divided and run.

Everything here imports torch at its use, not before: most estimates find their profile and need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, Attention
from configs.errors import ConfigError, CookbookError
from configs.schema import Config
from trainer.axes import CONTEXT, PIPELINE
from trainer.estimate.bounds import states_bytes, upper_bytes
from trainer.estimate.profile import Outline, Part, kept_layers
from trainer.model.importing import import_transformers
from trainer.plan.documents import by_mask
from trainer.plan.model_fields import attention_spans
from trainer.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotEstimated(CookbookError):
    """The command cannot answer for this configuration, and says what it would have left out."""


def why_not(error: Exception) -> str:
    """The reason for a missing estimate, in one line: the message of a refusal, or a defect's name."""
    if isinstance(error, CookbookError):
        return "; ".join(error.problems)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_models: dict[str, PreTrainedModel] = {}


class Tracer:
    """Builds the model once, at the first use. key: the fields that the model depends on."""

    def __init__(self, config: Config, plan: Plan, key: str) -> None:
        self.masked = by_mask(config)
        if config.model.attention is Attention.flash_attention_2:
            # The package runs on GPUs only. torch's flash kernel keeps the same tensors.
            config = replace(config, model=replace(config.model, attention=Attention.sdpa))
        self.config, self.plan, self.key = config, plan, key

    @cached_property
    def model(self) -> PreTrainedModel:
        """The last model built: building one takes as long as a trace, and a search traces one model at many shapes."""
        from trainer.passes import check_layout, prepare_model

        if self.key not in _models:
            model = prepare_model(self.config)
            _models.clear()
            _models[self.key] = model
        check_layout(_models[self.key], self.config)
        return _models[self.key]

    def outline(self) -> Outline:
        import_transformers()
        from trainer.axes.pipeline.probe import count_costs, examine
        from trainer.estimate.units import buffers_bytes, build_unit, describe_unit, layer_kinds, shares_modules

        if shares_modules(self.model):
            name, between = type(self.model).__name__, _between(self.config, self.plan, self.model)
            raise NotEstimated(
                f"model={self.config.model.preset}: decoder layers of {name} share parameters, which are counted for"
                f" each: not estimated. {between}; measure a run with a small train.micro_batch_size"
            )
        kinds = layer_kinds(self.model)
        layer_costs, head_cost, hidden_size = [], 0.0, 0
        if self.plan.degree(PIPELINE) > 1:
            found = examine(self.model)
            layer_costs, head_cost = count_costs(self.model, found)
            hidden_size = found.hidden_size
        # Nothing here depends on the dimension that splits sequences, and outlines are kept on disk without it.
        dense = self.plan.dense.resized(lambda axis: 1 if axis.name == CONTEXT else None)
        whole = replace(self.plan, views=(dense, *self.plan.views[1:]))
        layers = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        with build_unit(self.model, layers, self.config, whole) as unit:
            anatomy, buffers = describe_unit(unit, kinds), tuple(map(buffers_bytes, unit.layers))
        in_layers = sum(buffers[kind] for kind in kinds)
        return Outline(
            anatomy=replace(anatomy, buffers_bytes=anatomy.buffers_bytes + in_layers),
            layer_costs=tuple(layer_costs),
            head_cost=head_cost,
            hidden_size=hidden_size,
            layer_buffers_bytes=buffers,
            spans=attention_spans(self.model.config.get_text_config().to_dict()),
            scores=self.model.config._attn_implementation == Attention.eager,
        )

    def part(
        self,
        fields: Mapping[str, Any],
        kinds: tuple[int, ...],
        owned: range,
        *,
        stages: int,
        index: int,
        most: int | None = None,
    ) -> Part:
        """most: storages that may be born. Raises Unlike where there are more, and NotEstimated."""
        import_transformers()
        from trainer.estimate.trace import CannotTrace, trace_unit
        from trainer.estimate.units import Shape, build_unit, describe_unit
        from trainer.model.precision import torch_dtype

        storage, compute, logits = (None if dtype is None else torch_dtype(dtype) for dtype in fields["dtypes"])
        assert storage is not None
        shape = Shape(
            micro_batch_size=fields["micro_batch_size"],
            seq_len=fields["seq_len"],
            storage=storage,
            compute=compute,
            logits_dtype=logits,
            gpu=fields["gpu"],
            exact_attention=fields["exact_attention"],
            positions=self.plan.degree(CONTEXT) > 1 or self.config.data.document_mask,
            documents=self.masked,
            split_backward=fields["split_backward"],
            backward=fields["backward"],
        )
        layers = [owned[place] for place in kept_layers(kinds[owned.start : owned.stop])]
        first, last = index == 0, index == stages - 1
        try:
            with build_unit(self.model, layers, self.config, self.plan, first=first, last=last) as unit:
                anatomy, trace = describe_unit(unit, kinds), trace_unit(unit, shape, most=most)
        # The model with few of its layers may break a rule of its architecture; the whole model has passed it already.
        except (CannotTrace, ConfigError) as error:
            name, between = type(self.model).__name__, _between(self.config, self.plan, self.model)
            raise NotEstimated(
                f"model={self.config.model.preset}: the code of {name} does not run without values ({error}), so"
                f" its activations cannot be counted: not estimated. {between}; measure a run with a small"
                " train.micro_batch_size"
            ) from None
        return Part(groups=anatomy.groups, buffers_bytes=anatomy.buffers_bytes, trace=trace)


def _between(config: Config, plan: Plan, model: PreTrainedModel) -> str:
    """The bounds of `bounds`, in a sentence."""
    from trainer.flops import count_parameters
    from trainer.model.layers import is_packed, owned

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(
        sum(owner.packed_bytes()) if is_packed(owner, leaf) else parameter.numel() * BYTES[plan.param_dtype]
        for _, owner, leaf, parameter in owned(model)
        if not parameter.requires_grad
    )
    below = states_bytes(plan, trained, config.optimizer, frozen=frozen) / 2**30
    above = upper_bytes(config, plan, count_parameters(model))
    beside = f" that are trained, and {frozen / 2**30:,.2f} GiB that are not" if frozen else ""
    text = f"A GPU needs more than {below:,.2f} GiB, for the states of its {trained:,} parameters{beside}"
    if above is None:
        return text
    return f"{text}, and less than {above / 2**30:,.2f} GiB if it is a dense decoder that keeps all in float32"
