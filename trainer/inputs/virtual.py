"""What the kinds of this room have in common: n virtual tokens before the text of every sequence.

    virtual tokens [n, ...] (trained) --+
                                        +--> the model (frozen), on n + seq_len tokens --> logits of the text alone
    text [batch, seq_len] --------------+

No loss is taken of the virtual tokens. peft's own modules hold the parameters, which the export writes as peft does:
the tokens' values, without the network that made them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from configs.choices import TuningMethod
from configs.schema import Config, Tuning
from trainer.plan.model_fields import config_fields, sizes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ENCODER = "prompt_encoder"
"""Where the model has the virtual tokens, as peft names it."""
METHODS = (TuningMethod.prompt, TuningMethod.p_tuning, TuningMethod.prefix)


class VirtualTokens:
    """Fulfils `trainer.linear.Kind`. Subclasses refuse more, and build what holds their parameters."""

    KEEPS_MODEL = False
    LOGITS_OF_ALL = True
    """Whether the head sees the virtual tokens too, so that their logits are cut off behind it."""

    def __init__(self, method: TuningMethod) -> None:
        self.method, self.__name__ = method, f"trainer.inputs.{method}"

    def chosen(self, config: Config) -> bool:
        return config.tuning.method is self.method

    def problems(self, config: Config) -> Iterator[str]:
        if not self.chosen(config):
            if self.method is TuningMethod.prompt and config.tuning.method not in METHODS:
                yield from _without_use(config)
            return
        parallel, count = config.parallel, config.tuning.virtual_tokens
        for named, degree in ((f"parallel.pp={parallel.pp}", parallel.pp), (f"parallel.cp={parallel.cp}", parallel.cp)):
            if degree > 1:
                yield (
                    f"{named}: passes on sequences of data.seq_len, and tuning={self.method} puts"
                    f" {count} tokens before each; use parallel=fsdp, or tuning=lora"
                )
        if config.data.document_mask:
            yield (
                f"data.document_mask=true: hides from a document what stands before it, the virtual tokens of"
                f" tuning={self.method} too; set it to false, or use tuning=lora"
            )
        if config.train.compile:
            yield f"train.compile=true: is not offered with tuning={self.method}; set it to false"
        if config.train.chunked_loss and self.LOGITS_OF_ALL:
            yield (
                f"train.chunked_loss=true: computes the loss in the head, which tuning={self.method} gives {count}"
                " tokens more than there are labels; set it to false, or use tuning=prefix"
            )
        positions = sizes(config_fields(config)).positions
        if positions is not None and config.data.seq_len + count > positions:
            yield (
                f"tuning.virtual_tokens={count}: with data.seq_len={config.data.seq_len} they are more than the model's"
                f" {positions} positions; use fewer of either"
            )
        tp = parallel.tp
        if parallel.sequence_parallel and tp > 1 and (config.data.seq_len + count) % tp:
            yield (
                f"tuning.virtual_tokens={count}: parallel.sequence_parallel=true splits them with the text over"
                f" parallel.tp={tp}; use {max(tp, count // tp * tp)}"
            )

    def convert(self, model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
        from trainer.inputs.layers import add_virtual_tokens

        add_virtual_tokens(model, self.method, config.tuning.virtual_tokens, base=config.model.path)

    def imitate(self, model: PreTrainedModel, config: Config) -> None:
        from trainer.inputs.layers import add_virtual_tokens

        # As many as sequence parallel can divide.
        add_virtual_tokens(model, self.method, config.parallel.tp, base=None, on_meta=False)

    def owns(self, name: str) -> bool:
        # All kinds of this room keep theirs in one place; a model has one kind.
        return name.startswith(f"{ENCODER}.")

    def fill(self, unit: Any, prefix: str, keys: list[str], tuning: Tuning, generator: Any) -> None:
        from trainer.inputs.layers import begin

        begin(unit, prefix, keys, generator)

    def report(self, model: PreTrainedModel) -> None:
        from trainer.model.peft import log_trained

        log_trained(model, str(self.method))

    def identity(self, config: Config) -> dict[str, Any]:
        model = config.model
        return {
            "tuning.virtual_tokens": config.tuning.virtual_tokens,
            "tuning.base": [str(model.weights), model.path, model.revision],
        }

    def restore(self, model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
        from trainer.inputs.layers import add_virtual_tokens

        if identity.get("tuning.method") == self.method:
            base = identity["tuning.base"][1]
            add_virtual_tokens(model, self.method, identity["tuning.virtual_tokens"], base=base)

    def matmuls(self) -> set[object]:
        return set()

    def settle(self, modules: Iterable[nn.Module]) -> None:
        """Nothing depends on the values."""

    def words(self, config: Config) -> str:
        return ""

    def traced(self, config: Config) -> Any:
        return config.tuning.virtual_tokens


def _without_use(config: Config) -> Iterator[str]:
    count = config.tuning.virtual_tokens
    if count != Tuning().virtual_tokens:
        yield (
            f"tuning.virtual_tokens={count}: is for {', '.join(METHODS)}, this is tuning={config.tuning.method}; choose"
            " tuning=prompt, or leave it out"
        )
