"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): the embeddings of virtual tokens are trained."""

from configs.choices import TuningMethod
from trainer.inputs.virtual import VirtualTokens

KIND = VirtualTokens(TuningMethod.prompt)
