"""Shared by the methods of this package: n virtual tokens before the text of every sequence.

    virtual tokens [n, ...] (trained) --+
                                        +--> the model (frozen), on n + seq_len tokens --> logits of the text alone
    text [batch, seq_len] --------------+

Virtual tokens contribute no loss. peft's own modules hold the parameters. The export is in peft's format: the tokens'
values, without the network that produced them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from configs.schema import Config, Tuning
from trainer.inputs.described import ENCODER, Described
from trainer.plan.model_fields import config_fields, sizes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class VirtualTokens(Described):
    """Fulfils `trainer.linear.Kind`."""

    KEEPS_MODEL = False

    def chosen(self, config: Config) -> bool:
        return config.tuning.method is self.method

    def problems(self, config: Config) -> Iterator[str]:
        if not self.chosen(config):
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
        if config.train.chunked_loss and self.AS_TEXT:
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

        add_virtual_tokens(model, self, config.tuning.virtual_tokens, base=config.model.path)

    def imitate(self, model: PreTrainedModel, config: Config) -> None:
        from trainer.inputs.layers import add_virtual_tokens

        # A number that sequence parallel can divide.
        add_virtual_tokens(model, self, config.parallel.tp, base=None, on_meta=False)

    def owns(self, name: str) -> bool:
        # All methods of this package keep theirs in one place; a model has one method.
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
            add_virtual_tokens(model, self, identity["tuning.virtual_tokens"], base=identity["tuning.base"][1])

    def exported(self, described: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        from trainer.inputs.layers import as_peft_saves

        return as_peft_saves(self, described, tensors)

    def matmuls(self) -> set[object]:
        return set()

    def settle(self, modules: Iterable[nn.Module]) -> None:
        """Nothing depends on the values."""

    def description(self, config: Config) -> str:
        return ""

    def traced(self, config: Config) -> Any:
        return config.tuning.virtual_tokens
