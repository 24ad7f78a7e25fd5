"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): virtual tokens' keys and values are trained, in every layer."""

from collections.abc import Iterator
from typing import Any

from configs.choices import Checkpointing, TuningMethod
from configs.schema import Config
from trainer.inputs.virtual import VirtualTokens


class Prefix(VirtualTokens):
    AS_TEXT = False

    def described(self, common: dict[str, Any], text: Any) -> Any:
        """Features of one virtual token: those of all key/value heads."""
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or common["token_dim"] // text.num_attention_heads
        return super().described({**common, "num_attention_heads": heads, "token_dim": heads * width}, text)

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if not self.chosen(config):
            return
        if config.parallel.tp > 1:
            yield (
                f"parallel.tp={config.parallel.tp}: gives each rank some heads, and tuning=prefix holds keys and values"
                " of all; use parallel=fsdp, or tuning=prompt"
            )
        recompute = config.train.activation_checkpointing
        if recompute is not Checkpointing.none:
            yield (
                f"train.activation_checkpointing={recompute}: would put the keys and values of tuning=prefix before the"
                " text a second time; set it to none, or use tuning=prompt"
            )


KIND = Prefix(TuningMethod.prefix, "PREFIX_TUNING")
