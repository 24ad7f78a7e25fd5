"""P-tuning (Liu et al. 2021, arXiv:2103.10385): three trained matrices produce the virtual tokens' embeddings."""

from typing import Any

from configs.choices import TuningMethod
from trainer.inputs.virtual import VirtualTokens


class PTuning(VirtualTokens):
    def described(self, common: dict[str, Any], text: Any) -> Any:
        return super().described({**common, "encoder_hidden_size": common["token_dim"]}, text)


KIND = PTuning(TuningMethod.p_tuning, "P_TUNING")
