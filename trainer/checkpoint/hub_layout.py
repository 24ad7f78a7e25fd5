"""A model's tensors in the form of a folder on the hub, which transformers does not always use in memory.

    in the model    model.layers.0.mlp.experts.gate_up_proj   [expert, gate and up, in]
    in the folder   model.layers.0.mlp.experts.0.gate_proj.weight, ...experts.0.up_proj.weight, ...experts.1. ...

transformers knows both, and `save_pretrained` writes the second. Its own code also converts here, one tensor at a time,
or the few that one conversion joins. A model whose code comes with its folder is written unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion


class HubLayout:
    """config: of the model whose tensors are converted."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.model = None
        self.converters: list[WeightConverter] = []
        self.waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return
        # A new model: an engine's may be a pipeline stage, or have a sharding engine's class.
        with init_empty_weights():
            self.model = AutoModelForCausalLM.from_config(config)
        # Whether a folder had the base model's prefix is unknown here: the model's names are kept.
        known = get_model_conversion_mapping(self.model, add_legacy=False)
        conversions = [one for one in known if not isinstance(one, PrefixChange)]
        self.model._weight_conversions = conversions
        reverse = [one.reverse_transform() for one in reversed(conversions)]
        self.converters = [one for one in reverse if isinstance(one, WeightConverter)]

    def add(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The folder's tensors made from this one, and from earlier ones that were waiting for it."""
        group, needed = self._group(name)
        self.waiting[group][name] = tensor
        if len(self.waiting[group]) == needed:
            yield from self._convert(self.waiting.pop(group))

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that waited for others in vain."""
        for group in list(self.waiting):
            yield from self._convert(self.waiting.pop(group))

    def _group(self, name: str) -> tuple[str, int]:
        """Where a tensor waits, and how many are converted together; 0: unknown, for those of a list of modules."""
        for converter in self.converters:
            group, pattern = converter.rename_source_key(name)
            if pattern is not None:
                patterns = converter.source_patterns
                return group, 0 if any("*" in one for one in patterns) else len(patterns)
        return name, 1

    def _convert(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        if self.model is not None:
            tensors = revert_weight_conversion(self.model, tensors)
        for name, tensor in tensors.items():
            # A file may not hold two tensors that share memory.
            part = tensor.untyped_storage().nbytes() > tensor.nbytes
            yield name, tensor.clone(memory_format=torch.contiguous_format) if part else tensor.contiguous()
