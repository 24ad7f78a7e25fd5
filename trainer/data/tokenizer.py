"""Text to token ids: any Hugging Face tokenizer, or `bytes`, which needs no training and no download.

`bytes` gives each byte of the UTF-8 text the id of its value, and <|endoftext|> the id 256. It is a real
`PreTrainedTokenizerFast`: exported beside a model, `AutoTokenizer` loads it again. Training data takes a
shortcut past it (the bytes of a string are its ids), which a test holds equal to what the tokenizer says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.schema import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A tokenizer as the data pipeline uses it. name: as the user gave it. vocabulary: highest id + 1.
    end: the id that ends a document. fingerprint: equal for tokenizers that encode equally."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    vocabulary: int
    end: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The ids of each text, without any special token added."""
        if self.name == BYTES:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        # verbose: a document may be longer than the model's context; it is cut into samples later.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, np.int64) for ids in encoded["input_ids"]]


def build_byte_tokenizer() -> PreTrainedTokenizerBase:
    """257 tokens: id(byte b) == b, <|endoftext|> == 256."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    # No character is in the vocabulary, so each falls back to the tokens of its bytes.
    core = Tokenizer(models.BPE(vocab={f"<0x{b:02X}>": b for b in range(256)}, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        # A document that spells "<|endoftext|>" is still thirteen bytes of text and does not end there.
        split_special_tokens=True,
    )


def build_encoder(config: Config, *, vocab_size: int | None) -> Encoder:
    """The tokenizer of `data.tokenizer`, else that of `model.path`, else `bytes`.

    vocab_size: of the model; None if the data never passes through the tokenizer. Raises DataError if the
    tokenizer cannot be loaded, has more tokens than the model, or has none that could end a document.
    """
    name = config.data.tokenizer or config.model.path or BYTES
    tokenizer = build_byte_tokenizer() if name == BYTES else _load(config, name)
    vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1
    if vocab_size is not None and vocabulary > vocab_size:
        raise DataError(
            f"{tokenizer_key(config)}={name}: has {vocabulary} token ids, but the model's vocabulary has {vocab_size};"
            f" set model.config.vocab_size={vocabulary}, or choose a smaller tokenizer (data.tokenizer={BYTES} has 257)"
        )
    return Encoder(
        tokenizer=tokenizer,
        name=name,
        vocabulary=vocabulary,
        end=_end_of_document(config, name, tokenizer),
        fingerprint=BYTES if name == BYTES else _fingerprint(tokenizer),
    )


def tokenizer_key(config: Config) -> str:
    """Where the name of the tokenizer stands in the configuration."""
    return "model.path" if config.data.tokenizer is None and config.model.path is not None else "data.tokenizer"


def _load(config: Config, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    of_model = name == config.model.path
    remedy = f"give a folder or hub id that holds one, or set data.tokenizer={BYTES}"
    path = Path(os.path.expanduser(name))
    if path.is_file():
        raise DataError(f"{tokenizer_key(config)}={name}: is a file; give the folder that holds tokenizer.json")
    if not path.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")):
        raise DataError(f"{tokenizer_key(config)}={name}: no such folder; {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name,
            revision=config.model.revision if of_model else None,
            trust_remote_code=config.model.trust_remote_code and of_model,
        )
    # The library raises OSError, ValueError, KeyError, ImportError and bare Exception for broken or absent files.
    except Exception as error:
        raise DataError(
            f"{tokenizer_key(config)}={name}: no tokenizer could be loaded ({first_line(error)}); {remedy}"
        ) from None
    # Given a folder without tokenizer files, some versions of the library make a tokenizer that knows no text.
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise DataError(
            f"{tokenizer_key(config)}={name}: no tokenizer could be loaded (no vocabulary is there); {remedy}"
        )
    return tokenizer


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough for one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text.rstrip(".:;, ")[:300]


def _end_of_document(config: Config, name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The EOS token; where a tokenizer has none (BERT's family), the token that it puts between or before texts."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return token
    raise DataError(
        f"{tokenizer_key(config)}={name}: has no EOS, SEP or BOS token to end a document with; set eos_token in its"
        f" tokenizer_config.json, or data.tokenizer={BYTES}"
    )


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole of a fast tokenizer; of a slow one, which cannot be written out, its class, vocabulary and options."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    options = {
        key: value
        for key, value in sorted(tokenizer.init_kwargs.items())
        if isinstance(value, str | int | float | bool) and key != "name_or_path"
    }
    return hashlib.sha256(f"{type(tokenizer).__name__}{json.dumps(options)}{content}".encode()).hexdigest()
