"""Bottleneck adapters: the model is frozen; in each decoder layer two thin matrices behind its MLP are trained.

    h --> MLP (frozen) --+---------------------------------------> (+) --> what the layer adds to its input
                         |                                          ^
                         +--> down [b, d] --> ReLU --> up [d, b] ---+       up begins at zero

`tuning.after_attention` adds a second one behind the attention of each layer. Houlsby et al. 2019 (arXiv:1902.00751,
behind both), Pfeiffer et al. 2021 (arXiv:2005.00247, only behind the MLP). peft has no such method, so the modules and
the export are our own: peft's file names, with a kind that peft refuses. Nothing can be merged, since no matrix of the
model computes the same. Tensor parallel is refused: an adapter's input may be divided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.adapter_folder import BOTTLENECK
from configs.choices import TuningMethod
from configs.keys import as_text
from configs.schema import Config, Tuning
from trainer.linear.common import base_of, description, exported, imitate, matmuls, settle  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEPS_MODEL = False
UNMERGED = (
    "holds a bottleneck adapter, which no matrix of its model can take up; use it as it is, or train with tuning=lora"
)


def chosen(config: Config) -> bool:
    return config.tuning.method is TuningMethod.adapter


def problems(config: Config) -> Iterator[str]:
    tuning = config.tuning
    if not chosen(config):
        plain = Tuning()
        for name in BOTTLENECK:
            if (value := getattr(tuning, name)) != getattr(plain, name):
                yield (
                    f"tuning.{name}={as_text(value)}: is for bottleneck adapters, this is tuning={tuning.method};"
                    " choose tuning=adapter, or leave it out"
                )
        return
    if config.parallel.tp > 1:
        yield (
            f"parallel.tp={config.parallel.tp}: may cut what tuning=adapter reads, and it holds its matrices whole; use"
            " parallel=fsdp, or tuning=lora"
        )
    if config.train.compile:
        yield "train.compile=true: compiles no layers with adapters behind them; set it to false, or use tuning=full"


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
    from trainer.linear.adapter_layers import check_stored
    from trainer.linear.bottleneck_layers import add_bottlenecks

    add_bottlenecks(model, config.tuning, base=config.model.path)
    check_stored(model, config.tuning)


def owns(name: str) -> bool:
    from trainer.linear.bottleneck_layers import PLACE

    return f".{PLACE}." in name


def fill(unit: Any, prefix: str, keys: list[str], tuning: Tuning, generator: Any) -> None:
    from trainer.linear.bottleneck_layers import begin

    begin(unit, prefix, keys, generator)


def report(model: PreTrainedModel) -> None:
    from trainer.model.peft import log_trained

    log_trained(model, "bottleneck adapters")


def identity(config: Config) -> dict[str, Any]:
    return {**{f"tuning.{name}": getattr(config.tuning, name) for name in BOTTLENECK}, **base_of(config)}


def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
    from trainer.linear.bottleneck_layers import add_bottlenecks

    if identity.get("tuning.method") == TuningMethod.adapter:
        tuning = Tuning(method=TuningMethod.adapter, **{name: identity[f"tuning.{name}"] for name in BOTTLENECK})
        add_bottlenecks(model, tuning, base=identity["tuning.base"][1])


def load(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapters of an exported folder into their model. Raises RuntimeError where they do not fit it."""
    from trainer.linear.bottleneck_layers import load_bottlenecks

    load_bottlenecks(model, folder)


def traced(config: Config) -> Any:
    return [getattr(config.tuning, name) for name in BOTTLENECK]
