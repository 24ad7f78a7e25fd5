"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): the embeddings of virtual tokens are trained."""

from typing import Any

from configs.choices import TuningMethod
from trainer.inputs.virtual import VirtualTokens


class Prompt(VirtualTokens):
    def encoder(self, described: Any, *others: Any) -> Any:
        return super().encoder(described, None)  # no text to initialise from


KIND = Prompt(TuningMethod.prompt, "PROMPT_TUNING")
