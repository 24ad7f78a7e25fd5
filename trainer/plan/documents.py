"""How attention stays inside each document (`data.document_mask`): by a mask, or by the documents' lengths."""

from __future__ import annotations

from configs.choices import Attention
from configs.schema import Config

BY_LENGTH = (Attention.flash_attention_2,)
"""Kernels that take the lengths of documents, so no mask is built."""


def by_length(config: Config) -> bool:
    return config.data.document_mask and config.model.attention in BY_LENGTH


def by_mask(config: Config) -> bool:
    """Whether a mask of seq_len x seq_len is built for each sequence."""
    return config.data.document_mask and not by_length(config)
