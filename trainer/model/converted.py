"""Converts a folder's tensors that do not match the model's one to one, by transformers' own rules.

    in the folder   model.layers.0.mlp.experts.0.gate_proj.weight, ...experts.0.up_proj.weight, ...experts.1. ...
    in the model    model.layers.0.mlp.experts.gate_up_proj   [expert, gate and up, in]

`from_pretrained` does so for a whole model at once, in every process. Here the same rules run only for the stored
tensors that one of the model's parameters needs, when it is filled: the memory is the same as for any other folder.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.auto import get_hf_quantizer

from trainer.model.fitting import CODES, FLOATS, INTEGERS
from trainer.model.stored import Stored


def give_back() -> None:
    """Let the C library return free memory to the system: glibc keeps blocks of up to 32 MiB, and the gaps between
    those of one layer seldom fit the next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True, slots=True)
class Group:
    """Stored tensors that are converted together. name: the first of their results. converter: None means a renaming.
    members: stored names, each with the converter's pattern that it matches."""

    name: str
    converter: WeightConverter | None
    members: list[tuple[str, str]] = field(default_factory=list)


class Conversion:
    """model: unsplit, on the meta device, not changed; its config says how codes become values."""

    def __init__(self, model: PreTrainedModel, folder: Path, stored: Mapping[str, Stored]) -> None:
        self.model, self.folder, self.stored = model, folder, stored
        config = copy.deepcopy(model.config)
        self.quantizer = get_hf_quantizer(config, None, {"": "cpu"}, None, {})[0]
        self.groups = {name: group for group in self._grouped() for name in self._made_of(group)}
        """Group by each of the model's names."""

    def read(self, group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's names that a group produces, and their values, read now."""
        with ExitStack() as stack:
            files = {file: None for file in (self.stored[name].file for name, _ in group.members)}
            opened = {file: stack.enter_context(safe_open(self.folder / file, framework="pt")) for file in files}
            read = {name: opened[self.stored[name].file].get_tensor(name) for name, _ in group.members}
            yield from self._convert(group, read).items()

    def _grouped(self) -> list[Group]:
        """Collected as in `convert_and_load_state_dict_in_model`."""
        rules = get_model_conversion_mapping(self.model, None, self.quantizer)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, known = self.model.base_model_prefix, self.model.state_dict()
        groups: dict[str, Group] = {}
        for name in sorted(self.stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], prefix, known)
            if target in known:
                converter = None if pattern is None else by_pattern[pattern]
                groups.setdefault(target, Group(target, converter)).members.append((name, pattern or name))
        return list(groups.values())

    def _made_of(self, group: Group) -> list[str]:
        """The names that a group produces: several are found by converting tensors without values."""
        if group.converter is None or len(group.converter.target_patterns) == 1:
            return [group.name]
        dtypes = FLOATS | CODES | INTEGERS
        found = {name: self.stored[name] for name, _ in group.members}
        empty = {n: torch.empty(s.shape, dtype=dtypes[s.dtype], device="meta") for n, s in found.items()}
        return list(self._convert(group, empty))

    def _convert(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if group.converter is None:
            return {group.name: tensors[group.members[-1][0]]}
        converter: Any = copy.deepcopy(group.converter)
        for name, pattern in group.members:
            converter.add_tensor(group.name, name, pattern, tensors[name])
        made = converter.convert(
            group.name, model=self.model, config=self.model.config, hf_quantizer=self.quantizer, loading_info=None
        )
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
