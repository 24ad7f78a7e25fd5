"""Text to token ids: any Hugging Face tokenizer, or `bytes`, which needs no training and no download.

A document is tokenised as the tokenizer would tokenise it alone: it begins with the tokens that the tokenizer puts
before a text (often BOS), and a control token that it spells is text (`plain_text`). `encoding` handles its pieces.

`bytes` gives each byte of the UTF-8 text the id of its value, and <|endoftext|> the id 256. It is a real
`PreTrainedTokenizerFast`: exported with a model, `AutoTokenizer` loads it again. Training data takes a shortcut (the
bytes of a string are its ids); a test compares it with the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray

from configs.choices import Bos, DataSource, Weights
from configs.errors import DataError, first_line
from configs.schema import Config
from trainer.data.paths import why_not_readable
from trainer.data.plain_text import Encoded, PlainText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A tokenizer as the data pipeline uses it.

    name: as the user gave it.
    vocabulary: highest id + 1.
    begin, end: the ids that begin a document, and the one that ends it.
    fingerprint: equal for tokenizers that encode equally.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    vocabulary: int
    end: int
    fingerprint: str
    plain: PlainText
    begin: tuple[int, ...] = ()

    @property
    def borders_matter(self) -> bool:
        """Whether the tokens of a text differ from those of its pieces."""
        return self.name != BYTES

    @property
    def places(self) -> bool:
        """Whether `encode_with_places` can give token positions, and there is a reason to ask."""
        return self.borders_matter and self.plain.places

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The ids of each text, without any special token added."""
        if self.name == BYTES:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        return [encoded.ids for encoded in self.plain.encode(texts)]

    def encode_with_places(self, texts: Sequence[str], *, places: bool) -> list[Encoded]:
        """The same, with the position of each token. places: false if nobody needs them."""
        return self.plain.encode(texts, places=places)


def build_byte_tokenizer() -> PreTrainedTokenizerBase:
    """257 tokens: id(byte b) == b, <|endoftext|> == 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Bytes as characters, GPT-2's way: printable ones are themselves, and the others follow from 256 on. Tokens named
    # <0x41> would work too until they are decoded: one byte that is not UTF-8 makes every byte of its text unreadable.
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in printed]
    characters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + place) for place, byte in enumerate(other)}
    core = Tokenizer(models.BPE(vocab={character: byte for byte, character in characters.items()}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        # A document that spells "<|endoftext|>" is still thirteen bytes of text and does not end there.
        split_special_tokens=True,
    )


class NoTokenizer:
    """Placeholder for a saved tokenizer, for a model without one."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> tuple[str, ...]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return ()

    def get_vocab(self) -> dict[str, int]:
        return {}


def no_tokenizer() -> PreTrainedTokenizerBase:
    """For data that is not text: it passes through no tokenizer, and the trainer only saves the given one."""
    return cast("PreTrainedTokenizerBase", NoTokenizer())


def tokenizer_to_export(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that is saved with the model although the data passes through none. A model without one is saved
    without one. Raises DataError for a `data.tokenizer` that cannot be loaded."""
    name = _name(config)
    if name == BYTES:
        return build_byte_tokenizer()
    try:
        return _load(config, name)
    except DataError as error:
        if config.data.tokenizer is not None:
            raise
        log.info("%s; none is needed, and the model is saved without one", error.problems[0].partition("; ")[0])
        return no_tokenizer()


def _name(config: Config) -> str:
    return config.data.tokenizer or config.model.path or BYTES


def build_encoder(config: Config, *, vocab_size: int | None) -> Encoder:
    """The tokenizer of `data.tokenizer`, else that of `model.path`, else `bytes`.

    vocab_size: of the model; None if it does not matter. Raises DataError if the tokenizer cannot be loaded, has more
    tokens than the model, has none that could end a document, or cannot begin one as `data.bos` requires.
    """
    name = _name(config)
    tokenizer = build_byte_tokenizer() if name == BYTES else _load(config, name)
    vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1
    if vocab_size is not None and vocabulary > vocab_size:
        pretrained = config.model.weights is Weights.pretrained
        remedy = "model.resize_vocabulary=true" if pretrained else f"model.config.vocab_size={vocabulary}"
        raise DataError(
            f"{tokenizer_key(config)}={name}: has {vocabulary} token ids, but the model's vocabulary has {vocab_size};"
            f" set {remedy}, or choose a smaller tokenizer (data.tokenizer={BYTES} has 257)"
        )
    what = f"{tokenizer_key(config)}={name}"
    end = _end_of_document(config, name, tokenizer)
    of_documents = config.data.source in (DataSource.builtin, DataSource.files, DataSource.hub)
    begin = begin_of_document(config, tokenizer, what) if of_documents else ()
    if config.data.document_mask and end in begin:
        raise DataError(
            f"data.document_mask=true: {what} begins documents with the token that ends them, {end}, so their borders"
            " cannot be seen; set data.bos=never"
        )
    _check_control_tokens(config, what, tokenizer)
    plain = PlainText(tokenizer, control_tokens=config.data.control_tokens, name=what)
    return Encoder(
        tokenizer=tokenizer,
        name=name,
        vocabulary=vocabulary,
        begin=begin,
        end=end,
        fingerprint=BYTES if name == BYTES else _fingerprint(tokenizer, begin, config.data.control_tokens),
        plain=plain,
    )


def tokenizer_key(config: Config) -> str:
    """The configuration key with the tokenizer's name."""
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
    if problems := list(_unreadable(path)):
        raise DataError(*(f"{tokenizer_key(config)}={name}: {problem}" for problem in problems))
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


def _unreadable(folder: Path) -> Iterator[str]:
    """Problems of a folder's tokenizer files."""
    try:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        for file in files:
            if file.suffix in (".jinja", ".json", ".model", ".txt") and not file.is_dir():
                yield from filter(None, [why_not_readable(file)])
    except OSError as error:
        yield f"cannot be looked up ({error.strerror}: {error.filename})"


def _end_of_document(config: Config, name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The EOS token; if a tokenizer has none (BERT's family), the token that it puts between or before texts."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return token
    raise DataError(
        f"{tokenizer_key(config)}={name}: has no EOS, SEP or BOS token to end a document with; set eos_token in its"
        f" tokenizer_config.json, or data.tokenizer={BYTES}"
    )


def begin_of_document(
    config: Config, tokenizer: PreTrainedTokenizerBase, what: str = "data.tokenizer"
) -> tuple[int, ...]:
    """The tokens before a text, unless `data.bos` overrides them. what: names the tokenizer in a DataError."""
    if config.data.bos is Bos.never:
        return ()
    begin = _put_before_a_text(tokenizer)
    if begin or (config.data.bos is Bos.auto and begin is not None):
        return begin
    if config.data.bos is Bos.auto:
        raise DataError(f"{what}: does not show how it begins a text; set data.bos=always, or data.bos=never")
    if not isinstance(tokenizer.bos_token_id, int):
        raise DataError(
            f"data.bos=always: {what} has no BOS token; set bos_token in its tokenizer_config.json, or data.bos=auto"
        )
    return (tokenizer.bos_token_id,)


def _put_before_a_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...] | None:
    """None: cannot be determined."""
    for text in ("a", "1", "the"):
        bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer(text)["input_ids"]
        for place in range(len(whole) - len(bare) + 1) if bare else ():
            if whole[place : place + len(bare)] == bare:
                return tuple(whole[:place])
    return None


def _check_control_tokens(config: Config, what: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if config.data.control_tokens and getattr(tokenizer, "split_special_tokens", False):
        raise DataError(
            f"data.control_tokens=true: {what} reads every text as text (split_special_tokens in its"
            " tokenizer_config.json); leave it out, or give another tokenizer"
        )


def _fingerprint(tokenizer: PreTrainedTokenizerBase, begin: tuple[int, ...], control_tokens: bool) -> str:
    """All of a fast tokenizer; of a slow one, which cannot be serialised, its class, vocabulary and options."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    options = {
        key: value
        for key, value in sorted(tokenizer.init_kwargs.items())
        if isinstance(value, str | int | float | bool) and key != "name_or_path"
    }
    # Whole documents, and text as text.
    rules = json.dumps([2, begin, control_tokens, tokenizers.__version__, str(tokenizer.special_tokens_map)])
    return hashlib.sha256(f"{type(tokenizer).__name__}{json.dumps(options)}{content}{rules}".encode()).hexdigest()
