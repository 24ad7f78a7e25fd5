"""Inserts adapters into a model on the meta device, by peft, and sets their initial values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from transformers import PreTrainedModel

from configs.adapter_folder import read_adapter
from configs.errors import ConfigError, DataError, first_line
from configs.schema import Tuning
from trainer.linear.adapter_start import PEFT_INIT, RESIDUAL
from trainer.linear.adapter_targets import Targets, find_targets, find_whole, kinds
from trainer.model.build import decoder_layers
from trainer.model.peft import NAME, import_peft, is_adapter, log_trained, plain_name, stored_name

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger(__name__)
SHOWN = 4


def add_adapters(
    model: PreTrainedModel, tuning: Tuning, *, base: str | None = None, without: Iterable[str] = ()
) -> None:
    """Insert the adapters that `tuning` asks for into a model on the meta device and freeze the rest, in place.

    base: `model.path`. without: names of parameters that get no gradient. Raises ConfigError for target modules that
    the model does not have, EnvironmentProblem without peft.
    """
    targets = find_targets(model, tuning, without=without)
    with init_empty_weights(include_buffers=False):
        insert_adapters(model, tuning, targets, base=base)


def insert_adapters(
    model: PreTrainedModel, tuning: Tuning, targets: Targets, *, base: str | None = None, strict: bool = True
) -> None:
    """The part of `add_adapters` that peft does, on any device. Raises the same errors."""
    if targets.stacks and (tuning.dora or tuning.init in RESIDUAL):
        raise ConfigError(
            f"tuning.target_modules={tuning.target_modules}: {targets.stacks[0]} is no linear layer, and"
            f" {'tuning.dora' if tuning.dora else f'tuning.init={tuning.init}'} is for linear layers; name those"
        )
    whole = find_whole(model, tuning, targets, strict=strict)
    # peft rewrites targets of some families, and asks a model for its config: a list of layers has none.
    layers = decoder_layers(model)
    prefix = next(f"{name}." for name, module in model.named_modules() if module is layers)
    names = [[name.removeprefix(prefix) for name in group] for group in (targets.linears, targets.stacks)]
    # Initial values need the frozen matrix, which is not here yet: `values` writes them.
    adapters = lora_config(tuning, base, *names, init=True)
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            # GPT-2's Conv1D: peft warns, and sets fan_in_fan_out correctly.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            inject_adapter_in_model(adapters, layers, adapter_name=NAME)
    except ValueError as error:
        raise ConfigError(f"tuning.target_modules={tuning.target_modules}: {first_line(error)}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or plain_name(name) in whole)
    del layers.peft_config
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in whole))
    init = PEFT_INIT[tuning.init]
    described: Any = {NAME: lora_config(tuning, base, *_as_peft_reads(model, targets), init=init, whole=modules)}
    model.peft_config = described


def _as_peft_reads(model: PreTrainedModel, targets: Targets) -> tuple[list[str], list[str]]:
    """Names for adapter_config.json: of modules, and of parameters.

    If peft mistakes a linear layer's name for that of an expert in transformers 4, the layer's weight is named: its
    adapter has the same matrices under the same names.
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
    """Log which parameters of a model with adapters, unsplit and on the meta device, are trained."""
    ranks: dict[int, list[str]] = {}
    adapted = set()
    for name, module in model.named_modules():
        rank = getattr(module, "r", None)
        if hasattr(module, "lora_A") and isinstance(rank, dict):
            # Around stacked experts: the parameter that the adapter is added to.
            whose = f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}"
            adapted.add(whose)
            ranks.setdefault(rank[NAME], []).append(whose)
    layers = {word for name in adapted for word in name.split(".") if word.isdigit()}
    some = "" if len(layers) == len(decoder_layers(model)) else f" of layers {', '.join(sorted(layers, key=int))}"
    for rank, names in ranks.items():
        log.info("adapters: rank %d for %s%s", rank, ", ".join(kinds(names)), some)
    apart = {plain_name(name): p for name, p in model.named_parameters() if not is_adapter(name)}
    if whole := [name.rpartition(".")[0] for name, p in apart.items() if p.requires_grad]:
        log.info("adapters: trained whole are %s", ", ".join(kinds(whole)))
    alone = kinds(name for name, p in apart.items() if p.ndim > 1 and not p.requires_grad and name not in adapted)
    having = kinds(adapted)
    log.info("adapters: frozen without one are %s", ", ".join(name for name in alone if name not in having))
    log_trained(model, "adapters")


def check_stored(model: PreTrainedModel, tuning: Tuning) -> None:
    """Raise DataError if the tensors of `tuning.adapter` are not the ones that are trained."""
    if tuning.adapter is None:
        return
    key = f"tuning.adapter={tuning.adapter}"
    there = dict(read_adapter(tuning.adapter, key).shapes)
    here = {stored_name(name): tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"{key}: lacks {name}, which the model would train" for name in here.keys() - there.keys()]
    problems += [f"{key}: holds {name}, for which the model has no place" for name in there.keys() - here.keys()]
    problems += [
        f"{key}: {name} has the shape {list(there[name])}, in the model it is {list(here[name])}"
        for name in here.keys() & there.keys()
        if here[name] != there[name]
    ]
    if problems:
        more = [f"{key}: and {len(problems) - SHOWN} more such differences"] if len(problems) > SHOWN else []
        raise DataError(*sorted(problems)[:SHOWN], *more, f"{key}: give the base of this adapter as model.path")


def lora_config(
    tuning: Tuning,
    base: str | None,
    linears: list[str],
    parameters: list[str],
    *,
    init: bool | str,
    whole: Sequence[str] = (),
) -> LoraConfig:
    """peft's description of the adapters. base: `model.path`, the model on which peft loads them. linears, parameters:
    names of the adapted modules and parameters. whole: modules that are fully trained as well. Raises
    EnvironmentProblem."""
    return import_peft(tuning.method).LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=tuning.dropout,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        init_lora_weights=init,  # pyright: ignore[reportArgumentType]
        target_modules=sorted(linears),
        target_parameters=sorted(parameters) or None,
        modules_to_save=sorted(whole) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
