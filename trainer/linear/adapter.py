"""Adapters (LoRA): a frozen model, and beside its linear layers thin matrices that are trained in its place.

    x ----> W (frozen) --------------------------> (+) ---> y = W x + alpha / rank * B A x
      \\                                            /
       +--> dropout --> A [rank, in] --> B [out, rank]        B begins at zero: step 1 starts from the model itself

To every later pass an adapter is two more small matrices of its decoder layer. Nothing is merged; what is saved and
exported is the adapter, in peft's format. How they get in: `adapter_layers`; which layers get one: `adapter_targets`.
Hu et al. 2021 (LoRA, arXiv:2106.09685), Dettmers et al. 2023 (arXiv:2305.14314, section 4: adapters on all linear
layers).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from configs.choices import TuningMethod
from configs.schema import Config, Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEPS_MODEL = False


def chosen(config: Config) -> bool:
    return config.tuning.method in (TuningMethod.lora, TuningMethod.qlora)


def problems(config: Config) -> Iterator[str]:
    tuning = config.tuning
    if not chosen(config):
        if tuning.target_modules:
            yield (
                f"tuning.target_modules={tuning.target_modules}: is for adapters, this is tuning={tuning.method};"
                " choose tuning=lora, or leave it out"
            )
    elif config.train.compile:
        yield "train.compile=true: compiles no layers with adapters; set it to false, or use tuning=full"


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
    """The model gets peft's attribute `peft_config`, from which the export knows that it has adapters."""
    from trainer.linear.adapter_layers import add_adapters

    add_adapters(model, config.tuning, base=config.model.path, without=untrained)


def imitate(model: PreTrainedModel, config: Config) -> None:
    from trainer.linear.adapter_layers import insert_adapters
    from trainer.linear.adapter_targets import find_targets

    insert_adapters(model, config.tuning, find_targets(model, config.tuning.target_modules, strict=False))


def report(model: PreTrainedModel) -> None:
    from trainer.linear.adapter_layers import log_adapters

    log_adapters(model)


def identity(config: Config) -> dict[str, Any]:
    """What makes saved adapters those of this run: the model beneath them is not saved with them."""
    tuning, model = config.tuning, config.model
    return {
        "tuning.rank": tuning.rank,
        "tuning.alpha": tuning.alpha,
        "tuning.target_modules": sorted(tuning.target_modules),
        "tuning.base": [str(model.weights), model.path, model.revision],
    }


def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
    from trainer.linear.adapter_layers import add_adapters

    if "tuning.base" in identity:
        fields = {key: identity[f"tuning.{key}"] for key in ("rank", "alpha", "target_modules")}
        add_adapters(model, Tuning(method=TuningMethod.lora, **fields), base=identity["tuning.base"][1])


def matmuls() -> set[object]:
    """Both of an adapter's matrices are plain linear layers."""
    return set()
