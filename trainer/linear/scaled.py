"""(IA)3: the model is frozen; in each decoder layer three vectors that multiply features are trained.

    x --> W_k (frozen) --> * l_k        keys and values: what comes out of the layer
    h --> * l_ff --> W_down (frozen)    the MLP's features: what goes into its last matrix

All begin at one. peft's table names these layers, by architecture. Liu et al. 2022 (arXiv:2205.05638). Tensor parallel
is refused: heads that several ranks compute would share a vector.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from configs.choices import TuningMethod
from configs.schema import Config, Tuning
from trainer.linear.common import base_of, description, exported, imitate, matmuls, settle  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEPS_MODEL = False


def chosen(config: Config) -> bool:
    return config.tuning.method is TuningMethod.ia3


def problems(config: Config) -> Iterator[str]:
    if not chosen(config):
        return
    if config.parallel.tp > 1:
        yield (
            f"parallel.tp={config.parallel.tp}: cuts features that tuning=ia3 multiplies by vectors it holds whole; use"
            " parallel=fsdp, or tuning=lora"
        )
    if config.train.compile:
        yield "train.compile=true: compiles no layers with vectors of tuning=ia3; set it to false, or use tuning=full"


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
    from trainer.linear.scaled_layers import add_vectors

    add_vectors(model, base=config.model.path)


def owns(name: str) -> bool:
    return ".ia3_l." in name


def fill(unit: Any, prefix: str, keys: list[str], tuning: Tuning, generator: Any) -> None:
    for key in keys:
        unit.get_parameter(key).fill_(1)


def report(model: PreTrainedModel) -> None:
    from trainer.model.peft import log_trained

    if any(owns(name) for name, _ in model.named_parameters()):
        log_trained(model, "ia3")


def identity(config: Config) -> dict[str, Any]:
    return base_of(config)


def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
    from trainer.linear.scaled_layers import add_vectors

    if identity.get("tuning.method") == TuningMethod.ia3:
        add_vectors(model, base=identity["tuning.base"][1])


def traced(config: Config) -> Any:
    return None
