"""Inserts the vectors of (IA)3 into a model on the meta device, by peft."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate import init_empty_weights
from transformers import PreTrainedModel

from configs.errors import ConfigError
from trainer.model.build import decoder_layers
from trainer.model.peft import NAME, import_peft


def add_vectors(model: PreTrainedModel, *, base: str | None) -> None:
    """base: `model.path`. Raises ConfigError for an architecture that peft's table does not have, or knows in another
    form, EnvironmentProblem without peft."""
    peft = import_peft("ia3")
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = model.config.model_type
    if kind not in TARGETS or kind not in FEEDFORWARD:
        raise ConfigError(
            f"tuning=ia3: peft does not say which layers of a {kind} are keys, values and the end of the MLP; use"
            " tuning=lora"
        )
    names = [f".{name}" for name, _ in model.named_modules()]
    if missing := [target for target in TARGETS[kind] if not any(name.endswith(f".{target}") for name in names)]:
        raise ConfigError(
            f"tuning=ia3: peft multiplies {', '.join(TARGETS[kind])} of a {kind}, and {type(model).__name__} has no"
            f" {', '.join(missing)}; use tuning=lora"
        )
    described: Any = peft.IA3Config(
        target_modules=list(TARGETS[kind]),
        feedforward_modules=list(FEEDFORWARD[kind]),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        # GPT-2's Conv1D: peft warns, and sets fan_in_fan_out correctly.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        peft.inject_adapter_in_model(described, decoder_layers(model), adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".ia3_l." in name)
    del decoder_layers(model).peft_config
    model.peft_config = {NAME: described}  # pyright: ignore[reportAttributeAccessIssue]
