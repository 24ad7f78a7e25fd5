"""`model.resize_vocabulary`: how many rows the model gets, settled before it is built or estimated.

As many as the tokenizer has tokens, if these are more than the folder has rows; `model.config.vocab_size` gives another
number, a multiple of 64 for one. Which values the new rows get is said by `trainer.model.weights`.
"""

from __future__ import annotations

from configs.schema import Config


def settle_vocabulary(config: Config) -> None:
    """Write the number of rows into `model.config.vocab_size`, in place, where the user asks for it.

    Raises DataError when the tokenizer or the folder cannot be read.
    """
    model = config.model
    if not model.resize_vocabulary or "vocab_size" in model.config:
        return
    from trainer.data.tokenizer import build_encoder
    from trainer.model.build import build_hf_config, text_config

    tokens = build_encoder(config, vocab_size=None).vocabulary
    if tokens > text_config(build_hf_config(model)).vocab_size:
        model.config["vocab_size"] = tokens
