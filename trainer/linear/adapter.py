"""Adapters (LoRA): the model is frozen; low-rank matrices next to its linear layers are trained instead.

    x ----> W (frozen) --------------------------> (+) ---> y = W x + alpha / rank * B A x
      \\                                            /
       +--> dropout --> A [rank, in] --> B [out, rank]        B begins at zero: step 1 starts from the model itself

To every later pass an adapter is two more small matrices of its decoder layer. Nothing is merged; the adapter is saved
and exported in peft's format. `adapter_layers` inserts them; `adapter_targets` chooses their layers. Hu et al. 2021
(LoRA, arXiv:2106.09685), Dettmers et al. 2023 (arXiv:2305.14314, section 4: adapters on all linear layers).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from configs.choices import AdapterInit, EngineName, TuningMethod
from configs.keys import as_text
from configs.schema import Config, Tuning
from trainer.linear.common import base_of, description, exported, matmuls, settle  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEPS_MODEL = False
LIGHTER: tuple[str, dict[str, object]] = (
    "train adapters next to the frozen model (LoRA)",
    {"tuning.method": TuningMethod.lora},
)
"""The suggestion of this kind for a config that trains the whole model."""
BARE = {"tuning.method": str(TuningMethod.lora)}
"""The identity of saved adapters without further information."""
SAVED = ("rank", "alpha", "rslora", "dora", "init", "target_modules", "layers", "modules_to_save")
"""Fields of `Tuning` that the saved tensors and their use depend on."""
OWN = ("rank", "alpha", "dropout", "rslora", "dora", "init", "target_modules", "layers", "modules_to_save")
"""Fields that have no meaning for other methods."""


def chosen(config: Config) -> bool:
    return config.tuning.method in (TuningMethod.lora, TuningMethod.qlora)


def problems(config: Config) -> Iterator[str]:
    tuning = config.tuning
    if not chosen(config):
        plain = Tuning()
        for name in OWN:
            if (value := getattr(tuning, name)) != getattr(plain, name):
                yield (
                    f"tuning.{name}={as_text(value)}: is for lora, qlora, this is tuning={tuning.method};"
                    " choose tuning=lora, or leave it out"
                )
        return
    if config.train.compile:
        yield "train.compile=true: compiles no layers with adapters; set it to false, or use tuning=full"
    for entry in tuning.target_modules:
        try:
            re.compile(entry)
        except re.error as error:
            yield f"tuning.target_modules={tuning.target_modules}: {entry} is no regular expression ({error})"
    if tuning.dora:
        yield from _dora_problems(config)


def _dora_problems(config: Config) -> Iterator[str]:
    """The length of a row of W + B A needs the row's values, outside of the layer's own forward."""
    parallel = config.parallel
    if config.tuning.method is TuningMethod.qlora:
        yield "tuning.dora=true: reads the frozen matrix, which tuning=qlora keeps packed; use tuning=lora"
    if parallel.tp > 1:
        yield (
            f"tuning.dora=true: needs whole rows of each matrix, and parallel.tp={parallel.tp} cuts them; use"
            " parallel=fsdp"
        )
    if parallel.engine is EngineName.deepspeed and parallel.zero_stage == 3:
        yield (
            "tuning.dora=true: reads the frozen matrix where ZeRO 3 has not gathered it; use parallel=fsdp, or"
            " parallel.zero_stage=2"
        )


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
    """The model gets peft's attribute `peft_config`, by which the export recognises adapters."""
    from trainer.linear.adapter_layers import add_adapters, check_stored

    add_adapters(model, config.tuning, base=config.model.path, without=untrained)
    check_stored(model, config.tuning)


def imitate(model: PreTrainedModel, config: Config) -> None:
    from trainer.linear.adapter_layers import insert_adapters
    from trainer.linear.adapter_targets import find_targets

    targets = find_targets(model, config.tuning, strict=False)
    # Stacks that get one here are divided by an axis that the small model has not.
    if targets.linears:
        insert_adapters(model, config.tuning, replace(targets, stacks=()), strict=False)


def owns(name: str) -> bool:
    from trainer.model.peft import is_adapter

    return is_adapter(name)


def fill(unit: Any, prefix: str, keys: list[str], tuning: Tuning, generator: Any) -> None:
    """In each layer both matrices, which may begin as a part of the frozen one."""
    from trainer.linear.adapter_start import begin

    for layer in dict.fromkeys(key.partition(".lora_")[0] for key in keys):
        drawn = partial(_drawn, generator, f"{prefix}{layer}")
        begin(unit.get_submodule(layer), tuning.init, drawn)


def _drawn(generator: Any, layer: str, leaf: str, device: Any) -> Any:
    return generator(f"{layer}.{leaf}", device)


def report(model: PreTrainedModel) -> None:
    from trainer.linear.adapter_layers import log_adapters

    log_adapters(model)


def identity(config: Config) -> dict[str, Any]:
    """The identity of this run's adapters: the base model is not saved with them."""
    tuning = config.tuning
    return {
        **{
            f"tuning.{name}": sorted(value) if isinstance(value := getattr(tuning, name), list) else value
            for name in SAVED
        },
        **base_of(config),
    }


def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
    from trainer.linear.adapter_layers import add_adapters

    if identity.get("tuning.method") in (TuningMethod.lora, TuningMethod.qlora):
        fields = {name: identity[f"tuning.{name}"] for name in SAVED if f"tuning.{name}" in identity}
        fields["init"] = AdapterInit(fields.get("init", AdapterInit.kaiming))
        add_adapters(model, Tuning(method=TuningMethod.lora, **fields), base=identity["tuning.base"][1])


def traced(config: Config) -> Any:
    tuning = config.tuning
    return {**asdict(tuning), "alpha": 0, "dropout": tuning.dropout > 0, "adapter": None}
