"""Sources of parameter values: random by the model's own recipe, or a folder of safetensors.

    open_weights   the whole model, without memory   -> a source; `fitting` has compared it with the folder
    source.of      the model, or a pipeline stage    -> the object that fills it

Both fill one unit of the model at a time under any layout, so every layout starts from the same bits.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from configs.choices import Weights
from configs.errors import DataError, first_line
from configs.schema import Model
from trainer.model.build import build_model
from trainer.model.constructed import Constructors
from trainer.model.converted import Conversion, give_back
from trainer.model.filling import WeightSource
from trainer.model.fitting import Fit, fit, needed, persistent_buffers
from trainer.model.peft import plain_name
from trainer.model.stored import Stored, find_folder, read_config, read_tensors

log = logging.getLogger(__name__)


class RandomWeights:
    """The model's own initialisation, made independent of the layout.

    Each module draws from a generator seeded with the run's seed and its name, so a rank that fills only some units
    gets the same numbers as one that fills all.
    """

    def __init__(self, model: PreTrainedModel, seed: int, constructors: Constructors | None = None) -> None:
        """constructors: of the whole model, before a sharding engine replaces its class."""
        self.model = model
        self.seed = seed
        self.constructors = constructors or Constructors(model)

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        device = unit.get_parameter(keys[0]).device
        # For a head with tied weights and its own bias: the weights were filled by their owner, and a second draw would
        # give them the head's numbers.
        drawn = {id(unit.get_parameter(key)) for key in keys}
        filled = [
            (owner, leaf, parameter)
            for owner in unit.modules()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) not in drawn
        ]
        for owner, leaf, parameter in filled:
            owner._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        for key in keys:
            # NaN marks values that no initialiser writes.
            unit.get_parameter(key).fill_(torch.nan)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Children first: some models re-draw a child's weight in the parent (GPT-2's scaled c_proj).
            for module_name, module in reversed(list(unit.named_modules())):
                below = {id(parameter) for parameter in module.parameters()}
                if below and not below & drawn:
                    continue  # for example an adapter's, for which the model has no recipe
                _seed(device, self._seed_of(plain_name(f"{name}.{module_name}")))
                self._initialise(f"{name}.{module_name}", module)
        for owner, leaf, parameter in filled:
            owner._parameters[leaf] = parameter
        for key in keys:
            parameter = unit.get_parameter(key)
            if parameter.sum().isnan():
                place, _, leaf = plain_name(f"{name}.{key}" if name else key).rpartition(".")
                self.constructors.fill(place, leaf, parameter, self._seed_of)

    def _initialise(self, name: str, module: nn.Module) -> None:
        """By the recipe of the innermost model that contains it, as transformers does: an image tower has its own."""
        inner, place = self.model, self.model
        for part in filter(None, name.split(".")):
            if (place := place._modules.get(part)) is None:
                break
            inner = place if isinstance(place, PreTrainedModel) else inner
        inner._init_weights(module)

    def _seed_of(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def _seed(device: torch.device, seed: int) -> None:
    """Like torch.manual_seed, for one device: torch's inspects the stack for every absent kind of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class SavedWeights:
    """Parameters read from safetensors files, tensor by tensor through a memory map.

    stored, fitted: of the whole model. random: draws missing tensors.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Stored], fitted: Fit, random: RandomWeights) -> None:
        self.folder, self.stored, self.fitted, self.random = folder, stored, fitted, random

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        names = {key: plain_name(f"{name}.{key}" if name else key) for key in keys}
        _draw(self.random, self.fitted, name, unit, names)
        for key, full_name in names.items():
            if full_name not in self.fitted.drawn:
                parameter = unit.get_parameter(key)
                parameter.copy_(grow(self.read(full_name), parameter.shape))

    def read(self, name: str) -> torch.Tensor:
        stored_name = self.fitted.names[name]
        with safe_open(self.folder / self.stored[stored_name].file, framework="pt") as file:
            return file.get_tensor(stored_name)


class ConvertedWeights:
    """Parameters made from stored tensors that do not match the model's one to one (experts stored singly, float8 and
    its scales), loading as many at a time as one parameter needs."""

    def __init__(self, conversion: Conversion, fitted: Fit, random: RandomWeights) -> None:
        self.conversion, self.fitted, self.random = conversion, fitted, random

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        names = {key: plain_name(f"{name}.{key}" if name else key) for key in keys}
        _draw(self.random, self.fitted, name, unit, names)
        groups, parameters = self.conversion.groups, {}
        for key, full_name in names.items():
            if full_name not in self.fitted.drawn:
                parameters[self.fitted.names[full_name]] = unit.get_parameter(key)
        # Tensors that become several parameters of the unit are read once.
        for group in {id(groups[name]): groups[name] for name in parameters}.values():
            for made, value in self.conversion.read(group):
                if made in parameters:
                    parameters[made].copy_(grow(value, parameters[made].shape))
        give_back()


def open_weights(choice: Model, model: PreTrainedModel, *, seed: int) -> Callable[[PreTrainedModel], WeightSource]:
    """The source that `model.weights` asks for: given the model or a pipeline stage, it returns the object that fills
    it. Buffers that are saved with a model get their stored values here.

    model: unsplit, on the meta device, before any pass. Raises DataError as `check_weights` does.
    """
    constructors = Constructors(model)
    if choice.weights is Weights.random:
        return lambda part: RandomWeights(part, seed, constructors)
    folder, stored, fitted = check_weights(choice, model)
    if fitted.drawn:
        log.warning("model.missing_weights=random: drawn from train.seed: %s", ", ".join(sorted(fitted.drawn)))
    if fitted.theirs is None:
        read = SavedWeights(folder, stored, fitted, RandomWeights(model, seed, constructors)).read
        for name, buffer in persistent_buffers(model):
            if name in fitted.names:
                buffer.copy_(read(name))
        return lambda part: SavedWeights(folder, stored, fitted, RandomWeights(part, seed, constructors))
    log.info("model.path=%s: its tensors are not the model's one to one; they are converted one by one", choice.path)
    try:
        conversion = Conversion(build_model(choice, fitted.theirs), folder, stored)
        fitted = _placed(model, conversion, fitted)
        for name, buffer in persistent_buffers(model):
            if name in fitted.names:
                buffer.copy_(dict(conversion.read(conversion.groups[fitted.names[name]]))[fitted.names[name]])
    except Exception as error:  # conversions and dequantization raise their libraries' errors
        raise DataError(f"model.path={choice.path}: transformers cannot load it ({first_line(error)})") from None
    return lambda part: ConvertedWeights(conversion, fitted, RandomWeights(part, seed, constructors))


def check_weights(choice: Model, model: PreTrainedModel) -> tuple[Path, dict[str, Stored], Fit]:
    """Compare the folder of `model.path` with the model, from the headers of its files. Raises DataError, one line for
    each problem, if the folder or hub id cannot be read or lacks a required tensor."""
    key = f"model.path={choice.path}"
    folder = find_folder(choice)
    fields, stored = read_config(folder, key), read_tensors(folder, key)
    return folder, stored, fit(model, stored, fields, folder, choice)


def check_early(choice: Model, config: PretrainedConfig) -> None:
    """`check_weights` before there is data or an engine: a mistake costs seconds. config: from `build_hf_config`."""
    if choice.weights is Weights.pretrained:
        check_weights(choice, build_model(choice, config))


def grow(stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`stored`, with further rows up to this shape: each is the mean of the stored ones, so that a new token begins as
    an average of the known ones and takes little from them (Hewitt 2021, Initializing New Word Embeddings)."""
    if stored.shape == shape:
        return stored
    mean = stored.double().mean(dim=0, keepdim=True).to(stored.dtype)
    return torch.cat([stored, mean.expand(shape[0] - stored.shape[0], *stored.shape[1:])])


def _draw(random: RandomWeights, fitted: Fit, name: str, unit: nn.Module, names: Mapping[str, str]) -> None:
    """Draw this unit's missing weights, by the recipe and the numbers of `model.weights=random`."""
    drawn = [key for key, full_name in names.items() if full_name in fitted.drawn]
    if drawn:
        # All of them: a recipe may write several at once. The stored ones then replace the drawn ones.
        random.fill(name, unit, list(names))


def _placed(model: PreTrainedModel, conversion: Conversion, fitted: Fit) -> Fit:
    """`fitted` with the name of each of the model's tensors in the conversion; tied ones have several. Tensors that the
    folder lacks, and the model's class does not require, are drawn."""
    names, drawn = {}, set(fitted.drawn)
    for same, _ in needed(model):
        made = next((name for name in same if name in conversion.groups), None)
        if made is None:
            drawn.update(same)
        else:
            names.update(dict.fromkeys(same, made))
    return replace(fitted, names=names, drawn=frozenset(drawn))
