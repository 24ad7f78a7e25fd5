"""What a model is given besides the text: kinds that leave the model as it is and train virtual tokens before it.

    prompt      virtual tokens' embeddings                          tuning=prompt
    p_tuning    the same, out of a small trained network            tuning=p_tuning
    prefix      virtual tokens' keys and values, in every layer     tuning=prefix

They answer the questions of `trainer.linear.Kind` and stand in its table. Torch-free; what is computed: `layers`.
"""

from trainer.inputs import p_tuning, prefix, prompt

KINDS = (prompt.KIND, p_tuning.KIND, prefix.KIND)
