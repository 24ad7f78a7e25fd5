"""Start-up check of `data.document_mask`: does this architecture keep packed documents apart?

The trainer gives every document positions of its own, 0 1 2 0 1 2 3 ..., and no mask: transformers reads the borders
off the positions and builds the mask that its attention needs. Architectures that make their masks by themselves, or
carry a state along the sequence, would train on, seeing across the borders. So a shrunk copy computes two documents
in one row and alone: the logits must agree.
"""

from __future__ import annotations

import logging

import torch
from transformers import PretrainedConfig

from configs.errors import ConfigError, first_line
from trainer.model.miniature import small_model

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Of float64 logits. Some architectures compute norms in float32 whatever the model's dtype."""
LENGTHS = (3, 5)


def check_document_mask(config: PretrainedConfig) -> None:
    """Raise ConfigError where attention crosses the border between packed documents. Computes on the CPU."""
    try:
        apart = _apart(config)
    except Exception as error:  # a config in miniature may break any rule of its architecture
        reason = first_line(error)
        log.warning("data.document_mask not checked: a small %s does not run: %s", config.model_type, reason)
        return
    if apart > TOLERANCE:
        raise ConfigError(
            f"data.document_mask=true: a {config.model_type} sees across the border between packed documents whatever"
            " their positions say; set it to false"
        )


@torch.no_grad()
def _apart(config: PretrainedConfig) -> float:
    """Largest difference of the logits between one row and two."""
    model = small_model(config)
    ids = torch.arange(3, 3 + sum(LENGTHS))[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = [model(input_ids=document, use_cache=False).logits for document in ids.split(LENGTHS, dim=1)]
    return (packed - torch.cat(alone, dim=1)).abs().max().item()
