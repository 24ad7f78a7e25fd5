"""Builds a causal language model on the meta device, unsplit, and checks that it is causal. Next: `trainer.passes`."""

from __future__ import annotations

from transformers import PreTrainedModel

from configs.choices import DType
from configs.errors import ConfigError
from configs.schema import Config
from trainer.model.build import build_hf_config, build_model, text_config
from trainer.model.probe import probe


def build_causal(config: Config) -> PreTrainedModel:
    """Build the model. Raises ConfigError if it is not causal, and whatever building it raises."""
    hf_config = build_hf_config(config.model)
    language = text_config(hf_config)
    model = build_model(config.model, hf_config)
    if config.precision.param_dtype is DType.float64 and model._can_set_experts_implementation():
        # torch's grouped matmul of experts has no float64.
        model.set_experts_implementation("eager")
    found = probe(language, config.data.seq_len)
    if found is not None and not found.causal:
        named = f"model.path={config.model.path}" if config.model.path is not None else f"model={config.model.preset}"
        remedy = "set model.config.is_decoder=true" if hasattr(language, "is_decoder") else "choose a causal model"
        raise ConfigError(
            f"{named}: a {type(model).__name__} as it is configured sees later tokens, so a loss on the next token"
            f" teaches it to copy; {remedy}"
        )
    return model
