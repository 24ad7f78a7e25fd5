"""What peft has of a kind of virtual tokens: a description, and the module with the parameters. Torch-free."""

from __future__ import annotations

from typing import Any

from configs.choices import TuningMethod

ENCODER = "prompt_encoder"
"""peft's attribute for the virtual tokens in a model."""


class Described:
    """method: the kind. peft: its name for it in adapter_config.json."""

    AS_TEXT = True
    """Whether they are embeddings before the text's, whose logits are cut off after the head; else keys and values."""

    def __init__(self, method: TuningMethod, peft: str) -> None:
        self.method, self.peft, self.__name__ = method, peft, f"trainer.inputs.{method}"

    def described(self, common: dict[str, Any], text: Any) -> Any:
        """peft's description, with the fields that all methods share. text: config of the language model."""
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft)](**common)

    def encoder(self, described: Any, *others: Any) -> Any:
        """peft's module with the parameters. others: further arguments of its class."""
        from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType

        return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(self.peft)](described, *others)
