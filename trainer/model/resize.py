"""`model.resize_vocabulary`: the model's number of rows, decided before it is built or estimated.

It is the tokenizer's number of tokens, if this exceeds the folder's rows; `model.config.vocab_size` sets another
number, for example a multiple of 64. `trainer.model.weights` defines the values of the new rows.
"""

from __future__ import annotations

from configs.schema import Config


def settle_vocabulary(config: Config) -> None:
    """Write the number of rows into `model.config.vocab_size`, in place, if the user asks for it.

    Raises DataError if the tokenizer or the folder cannot be read.
    """
    model = config.model
    if not model.resize_vocabulary or "vocab_size" in model.config:
        return
    from trainer.data.tokenizer import build_encoder
    from trainer.model.build import build_hf_config, text_config

    tokens = build_encoder(config, vocab_size=None).vocabulary
    if tokens > text_config(build_hf_config(model)).vocab_size:
        model.config["vocab_size"] = tokens
