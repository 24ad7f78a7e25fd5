"""Where the values of the parameters come from: random by the model's own recipe, or a folder of safetensors.

Both fill one unit of the model at a time, whatever the layout, so that every layout starts from the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.choices import Weights as WeightsChoice
from configs.errors import DataError
from configs.schema import Model

log = logging.getLogger(__name__)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter (`trainer.tuning`) and not to the model."""
    return "lora_" in name


def plain_name(name: str) -> str:
    """A parameter's or module's name in the model without adapters: peft puts a layer that has one one level down."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


class Weights(Protocol):
    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        """Write the values of the parameters `keys` of `unit`; `name` is the unit's place in the model."""
        ...


class RandomWeights:
    """The model's own initialisation, made independent of the layout.

    Each module draws from a generator seeded with the run's seed and its name, so a rank that fills only some of
    the units gets the same numbers as one that fills all.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model = model
        self.seed = seed

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        device = unit.get_parameter(keys[0]).device
        # A head with tied weights and a bias of its own: the weights were filled where they are owned, and a second
        # draw would give them the head's numbers.
        drawn = {id(unit.get_parameter(key)) for key in keys}
        filled = [
            (owner, leaf, parameter)
            for owner in unit.modules()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) not in drawn
        ]
        for owner, leaf, parameter in filled:
            owner._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Children first: some models re-draw a child's weight in the parent (GPT-2's scaled c_proj).
            for module_name, module in reversed(list(unit.named_modules())):
                torch.manual_seed(self._seed_of(plain_name(f"{name}.{module_name}")))
                self.model._init_weights(module)
        for owner, leaf, parameter in filled:
            owner._parameters[leaf] = parameter

    def _seed_of(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


class SavedWeights:
    """Parameters read from safetensors files, tensor by tensor through a memory map."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Raises DataError if the files cannot be read. Look at `missing` before the first `fill`."""
        self.folder = folder
        self.files = _tensor_files(folder)
        self.prefix = f"{model.base_model_prefix}."
        names = [name for name, _ in model.named_parameters() if not is_adapter(name)]
        self.missing = [name for name in names if self._stored_name(name) is None]

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        for key in keys:
            full_name = f"{name}.{key}" if name else key
            stored_name = self._stored_name(full_name)
            assert stored_name is not None
            with safe_open(self.folder / self.files[stored_name], framework="pt") as file:
                tensor = file.get_tensor(stored_name)
            parameter = unit.get_parameter(key)
            if tensor.shape != parameter.shape:
                raise DataError(
                    f"model.path={self.folder}: {stored_name} has shape {list(tensor.shape)}, the model wants"
                    f" {list(parameter.shape)}; take model.config overrides of sizes away"
                )
            parameter.copy_(tensor)

    def _stored_name(self, name: str) -> str | None:
        """Files written from the bare base model (GPT-2 on the hub) leave its prefix out."""
        name = plain_name(name)
        candidates = (name, name.removeprefix(self.prefix), self.prefix + name)
        return next((candidate for candidate in candidates if candidate in self.files), None)


class LoadedWeights:
    """Parameters of a model that transformers itself has loaded whole into host memory.

    For files whose tensors are not the model's parameters one to one (packed experts, .bin files).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.values = model.state_dict()

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        for key in keys:
            unit.get_parameter(key).copy_(self.values[plain_name(f"{name}.{key}" if name else key)])


def build_weights(choice: Model, model: PreTrainedModel, *, seed: int) -> Weights:
    """The source that `model.weights` asks for. Raises DataError when the folder or hub id cannot be read."""
    if choice.weights is WeightsChoice.random:
        return RandomWeights(model, seed)
    assert choice.path is not None
    folder = Path(choice.path).expanduser()
    if not folder.is_dir():
        try:
            patterns = ["*.safetensors", "*.json"]
            folder = Path(snapshot_download(choice.path, revision=choice.revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise DataError(f"model.path={choice.path}: {str(error).splitlines()[0]}") from None
    saved = SavedWeights(folder, model)
    if not saved.missing:
        return saved
    log.warning(
        "model.path=%s: no safetensors file holds %s as it is named in the model; loading the whole checkpoint"
        " through transformers in every process",
        choice.path,
        saved.missing[0],
    )
    try:
        loaded = AutoModelForCausalLM.from_pretrained(choice.path, revision=choice.revision, config=model.config)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"model.path={choice.path}: {str(error).splitlines()[0]}") from None
    return LoadedWeights(loaded)


def _tensor_files(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of a folder in the Hugging Face format; empty if it has no safetensors."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return dict(json.loads(index.read_text())["weight_map"])
        single = folder / "model.safetensors"
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single.name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"model.path={folder}: its safetensors cannot be read: {error}") from None
    return {}
