"""Inputs besides the text: methods that freeze the model and train virtual tokens before the text.

    prompt      virtual tokens' embeddings                          tuning=prompt
    p_tuning    the same, out of a small trained network            tuning=p_tuning
    prefix      virtual tokens' keys and values, in every layer     tuning=prefix

They implement `trainer.linear.Kind` and are listed in its table. Torch-free; `layers` has the computation.
"""

from collections.abc import Iterator

from configs.schema import Config, Tuning
from trainer.inputs import p_tuning, prefix, prompt

KINDS = (prompt.KIND, p_tuning.KIND, prefix.KIND)


def problems(config: Config) -> Iterator[str]:
    """The key that only these methods read, if none of them is chosen."""
    count, asked = config.tuning.virtual_tokens, config.tuning.method
    if count != Tuning().virtual_tokens and not any(kind.chosen(config) for kind in KINDS):
        yield (
            f"tuning.virtual_tokens={count}: is for {', '.join(kind.method for kind in KINDS)}, this is tuning={asked};"
            " choose tuning=prompt, or leave it out"
        )


def tokens_before(config: Config) -> int:
    """How many tokens the layers are given before those of every sequence."""
    return config.tuning.virtual_tokens if any(kind.chosen(config) and kind.AS_TEXT for kind in KINDS) else 0
