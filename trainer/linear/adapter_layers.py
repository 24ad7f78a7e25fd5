"""Adapters, put into a model on the meta device by peft, and their first values."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from configs.errors import ConfigError, EnvironmentProblem, first_line
from configs.schema import Tuning
from trainer.linear.adapter_targets import Targets, find_targets, kinds
from trainer.model.build import decoder_layers
from trainer.model.weights import WeightSource, is_adapter, plain_name

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger(__name__)
NAME = "default"  # peft's name of the only adapter


def add_adapters(
    model: PreTrainedModel, tuning: Tuning, *, base: str | None = None, without: Iterable[str] = ()
) -> None:
    """Put the adapters that `tuning` asks for into a model on the meta device and freeze the rest, in place.

    base: `model.path`. without: names of parameters that get no gradient. Raises ConfigError for target modules that
    the model does not have, EnvironmentProblem without peft.
    """
    targets = find_targets(model, tuning.target_modules, without=without)
    with init_empty_weights(include_buffers=False):
        insert_adapters(model, tuning, targets, base=base)


def insert_adapters(model: PreTrainedModel, tuning: Tuning, targets: Targets, *, base: str | None = None) -> None:
    """The part of `add_adapters` that is peft's, on any device. Raises as it does."""
    # peft rewrites targets of some families, and for that asks a model for its config: a list of layers has none.
    layers = decoder_layers(model)
    prefix = next(f"{name}." for name, module in model.named_modules() if module is layers)
    names = [[name.removeprefix(prefix) for name in group] for group in (targets.linears, targets.stacks)]
    adapters = lora_config(tuning, base, *names)
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            # GPT-2's Conv1D: peft sets what it says it sets.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            inject_adapter_in_model(adapters, layers, adapter_name=NAME)
    except ValueError as error:
        raise ConfigError(f"tuning.target_modules={tuning.target_modules}: {first_line(error)}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    del layers.peft_config
    described: Any = {NAME: lora_config(tuning, base, *_as_peft_reads(model, targets))}
    model.peft_config = described


def _as_peft_reads(model: PreTrainedModel, targets: Targets) -> tuple[list[str], list[str]]:
    """Names for adapter_config.json: of modules, and of parameters.

    Where peft takes the name of a linear layer for that of an expert as transformers 4 had it, the layer's weight is
    named: its adapter has the same matrices under the same names.
    """
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS

    experts = (
        ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj") if model.config.model_type in PATTERNS else ()
    )
    misread = [name for name in targets.linears if name.rpartition(".")[2] in experts]
    return [name for name in targets.linears if name not in misread], [
        *targets.stacks,
        *(f"{n}.weight" for n in misread),
    ]


def log_adapters(model: PreTrainedModel) -> None:
    """Log what of a model with adapters, still whole and on the meta device, is trained, and what is not."""
    ranks: dict[int, list[str]] = {}
    adapted = set()
    for name, module in model.named_modules():
        rank = getattr(module, "r", None)
        if hasattr(module, "lora_A") and isinstance(rank, dict):
            # Around stacked experts: the parameter that the adapter is added to.
            whose = f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}"
            adapted.add(whose)
            ranks.setdefault(rank[NAME], []).append(whose)
    for rank, names in ranks.items():
        log.info("adapters: rank %d for %s", rank, ", ".join(kinds(names)))
    alone = [plain_name(name) for name, p in model.named_parameters() if not is_adapter(name) and p.ndim > 1]
    log.info("adapters: frozen without one are %s", ", ".join(kinds(name for name in alone if name not in adapted)))
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (0, 1))
    log.info("adapters: %s of %s parameters are trained (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)


class AdapterWeights:
    """Fills the frozen model from `base` and the adapters by LoRA's recipe: A as a linear layer, B with zeros.

    Each A draws from a generator seeded with the run's seed and its name: the same numbers under every layout.
    """

    def __init__(self, base: WeightSource, seed: int) -> None:
        self.base, self.seed = base, seed

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        plain = [key for key in keys if not is_adapter(key)]
        if plain:
            self.base.fill(name, unit, plain)
        for key in keys:
            if is_adapter(key):
                self._fill_adapter(f"{name}.{key}", unit.get_parameter(key))

    def _fill_adapter(self, name: str, parameter: nn.Parameter) -> None:
        if ".lora_B." in name:
            nn.init.zeros_(parameter)
            return
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)


def lora_config(tuning: Tuning, base: str | None, linears: list[str], parameters: list[str]) -> LoraConfig:
    """peft's description of the adapters. base: `model.path`, which peft loads them upon. linears, parameters: the
    names of what gets one. Raises EnvironmentProblem."""
    # peft imports it where it is installed, and it tells every process of faster kernels that are not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from peft import LoraConfig
    except ImportError:
        raise EnvironmentProblem(
            f"tuning={tuning.method}: needs peft; pip install 'distributed-training-cookbook[tuning]'"
        ) from None
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=tuning.dropout,
        target_modules=sorted(linears),
        target_parameters=sorted(parameters) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
