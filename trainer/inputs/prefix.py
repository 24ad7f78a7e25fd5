"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): virtual tokens' keys and values are trained, in every layer."""

from collections.abc import Iterator

from configs.choices import Checkpointing, TuningMethod
from configs.schema import Config
from trainer.inputs.virtual import VirtualTokens


class Prefix(VirtualTokens):
    LOGITS_OF_ALL = False

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


KIND = Prefix(TuningMethod.prefix)
