"""Small tokenizers of every family, trained on the fly. Each prepends <s> to a text and has control tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CONTROL = ["<s>", "</s>", "<unk>", "<|im_end|>"]
TEXT = [
    "hello world, this is  a text\nof lines\n\n",
    "and more   blanks\n\n\n    def f(x):\n        return x + 1\n",
    "<|/_>é中",
]


def _finished(core: Tokenizer) -> PreTrainedTokenizerFast:
    begin = [("<s>", core.token_to_id("<s>"))]
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named, additional_special_tokens=["<|im_end|>"])
    # An ordinary vocabulary entry, not a control token.
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, like those of GPT-2, Llama 3 and Qwen."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=340, show_progress=False, special_tokens=CONTROL, initial_alphabet=alphabet),
    )
    return _finished(core)


def whole_text() -> PreTrainedTokenizerFast:
    """A tokenizer like that of Llama 2.

    It prepends a space to the text, treats the whole text as one word, and encodes unknown characters as bytes.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=340, show_progress=False, special_tokens=names, max_token_length=6)
    )
    return _finished(core)


def unigram() -> PreTrainedTokenizerFast:
    """A unigram tokenizer, like those of T5 and XLNet. The model itself contains the control tokens."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        TEXT * 20,
        trainers.UnigramTrainer(vocab_size=90, show_progress=False, special_tokens=CONTROL, unk_token="<unk>"),
    )
    return _finished(core)


def word_piece() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer, like that of BERT."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=120, show_progress=False, special_tokens=CONTROL)
    )
    return _finished(core)


def words_of_a_list() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(
        TEXT, trainers.WordLevelTrainer(vocab_size=120, show_progress=False, special_tokens=CONTROL)
    )
    return _finished(core)


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    made.__name__: cache(made) for made in (byte_level, whole_text, unigram, word_piece, words_of_a_list)
}


def save(family: str, folder: Path) -> Path:
    FAMILIES[family]().save_pretrained(folder)
    return folder
