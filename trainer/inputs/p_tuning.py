"""P-tuning (Liu et al. 2021, arXiv:2103.10385): virtual tokens' embeddings out of three trained matrices."""

from configs.choices import TuningMethod
from trainer.inputs.virtual import VirtualTokens

KIND = VirtualTokens(TuningMethod.p_tuning)
