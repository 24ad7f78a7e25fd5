"""The model that a run trains, on the meta device and still whole: the same for both engines and for the estimate.

    config -> model -> what of it can be trained here (`probe`) -> adapters, or all of it

Next: `parallelize`.
"""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from configs.choices import DType, TuningMethod
from configs.errors import ConfigError
from configs.schema import Config
from trainer.engine.probe import kinds_of, probe, untrained_names
from trainer.linear.rules import check_frozen
from trainer.linear.tuning import apply_tuning, tell_adapters
from trainer.model.build import build_hf_config, build_model, text_config

log = logging.getLogger(__name__)


def prepare_model(config: Config) -> PreTrainedModel:
    """The model, with what is trained of it marked. Raises as the two steps of it do."""
    model = build_causal(config)
    mark_trained(model, config)
    return model


def build_causal(config: Config) -> PreTrainedModel:
    """Build the model. Raises ConfigError for one that is not causal as it is called, and what building it raises."""
    hf_config = build_hf_config(config.model)
    language = text_config(hf_config)
    model = build_model(config.model, hf_config)
    if config.precision.param_dtype is DType.float64 and model._can_set_experts_implementation():
        # torch's grouped product of experts has no float64.
        model.set_experts_implementation("eager")
    found = probe(language)
    if found is not None and not found.causal:
        named = f"model.path={config.model.path}" if config.model.path is not None else f"model={config.model.preset}"
        remedy = "set model.config.is_decoder=true" if hasattr(language, "is_decoder") else "choose a causal model"
        raise ConfigError(
            f"{named}: a {type(model).__name__} as it is configured sees later tokens, so a loss on the next token"
            f" teaches it to copy; {remedy}"
        )
    return model


def mark_trained(model: PreTrainedModel, config: Config) -> None:
    """Insert adapters, or freeze what gets no gradient. Raises as `apply_tuning`."""
    found = probe(text_config(model.config))
    untrained = untrained_names(model, found) if found is not None else []
    apply_tuning(model, config.tuning, base=config.model.path, without=untrained)
    if config.tuning.method is TuningMethod.full:
        for name in untrained:
            model.get_parameter(name).requires_grad_(False)


def tell_trained(model: PreTrainedModel, config: Config) -> None:
    """Log what of a model, still whole, is not trained."""
    if config.tuning.method is not TuningMethod.full:
        tell_adapters(model)
        return
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        log.info("frozen: %d parameters get no gradient from text: %s", len(frozen), kinds_of(frozen))


def check_layout(model: PreTrainedModel, config: Config) -> None:
    """Raise ConfigError where the layout cannot train this model. The estimate keeps a model for several layouts."""
    name, parallel = type(model).__name__, config.parallel
    problems = []
    if model.config.get_text_config() is not model.config:
        # The passes that cut a model know the names of language models alone.
        problems += [
            f"parallel.{axis}={getattr(parallel, axis)}: cuts language models; a {name} has parts for images or sound"
            " as well; use parallel=single, ddp or fsdp"
            for axis in ("tp", "pp", "cp")
            if getattr(parallel, axis) > 1
        ]
    frozen = [full for full, parameter in model.named_parameters() if not parameter.requires_grad]
    problems += check_frozen(config, name, len(frozen), kinds_of(frozen))
    if problems:
        raise ConfigError(*problems)
