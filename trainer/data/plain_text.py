"""Text as text: a tokenizer that does not recognise control tokens in people's text.

    "a </s> b"  --the tokenizer-->   a  </s>  b            a document could end itself, or speak as the assistant
                --PlainText------>   a  <  /  s  >  b      the characters are tokenised like any others

A control token is one that the tokenizer declares special. The library's `split_special_tokens=True` keeps such tokens
from being matched before the model runs, but a Unigram or WordLevel model can still produce them, because their names
are entries of its vocabulary. So in a copy of the tokenizer each control token keeps its id and gets a name that no
text contains. Added tokens that are not special (Qwen's `<think>`, runs of spaces) are ordinary vocabulary.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

NAME = f"\ufdd0{secrets.token_hex(8)}"
"""Prefix of control tokens' new names: a Unicode noncharacter, and a part that no text can predict."""
GUARD = "\ufdd1"
"""A noncharacter inside a spelled-out control token while a chat template runs."""


BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Encoded(NamedTuple):
    """ids: [tokens] int64. starts: [tokens], index of each token's first character; None if unknown."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64] | None


class PlainText:
    """Encodes text without adding special tokens.

    control: id and name of each token that text cannot produce.
    places: whether the characters of each token are known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, control_tokens: bool, name: str) -> None:
        """control_tokens: let text produce them. name: of the tokenizer, as key=value. Raises DataError for a tokenizer
        that cannot treat its control tokens as text."""
        # The library's types name every argument and attribute of every kind of tokenizer.
        self._tokenizer: Any = tokenizer
        self._name = name
        self._splits = bool(getattr(tokenizer, "split_special_tokens", False))
        self.control = {} if control_tokens or self._splits else _control_tokens(tokenizer)
        core: Tokenizer | None = getattr(self._tokenizer, "backend_tokenizer", None)
        self.places = core is not None
        self._core = _copy(core, self.control, split=self._splits or not control_tokens) if core is not None else None
        self._matching: Tokenizer | None = None
        self._spelled = _alternatives(self.control.values())
        self._check()

    def encode(self, texts: Sequence[str], *, places: bool = False) -> list[Encoded]:
        """places: fill `Encoded.starts`, if known. Raises DataError for text that the tokenizer refuses."""
        try:
            if self._core is None:
                return [Encoded(ids, None) for ids in self._without_places(texts)]
            if not places:
                found = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
                return [Encoded(np.asarray(encoding.ids, np.int64), None) for encoding in found]
            return [_placed(encoding) for encoding in self._core.encode_batch(list(texts), add_special_tokens=False)]
        # The library raises bare exceptions, and panics that are no Exception.
        except BaseException as error:
            raise self._refused(error) from None

    def encode_rendered(self, text: str) -> Encoded:
        """The tokens of a chat template's output, including its control tokens, except for those inside text that
        `guarded` has changed. starts: characters of `text`."""
        if GUARD not in text:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
            return Encoded(np.asarray(encoded["input_ids"], np.int64), offsets[:, 0])
        if self._matching is None:
            self._matching = _copy(self._tokenizer.backend_tokenizer, self.control, split=False)
        names = {content: _renamed(number) for number, content in self.control.items()}
        written, characters = [], []
        for place, part in _parts(text, self._spelled):
            kept = names.get(part)
            written.append(kept or part.replace(GUARD, ""))
            characters += [place] * len(kept) if kept else [place + i for i, c in enumerate(part) if c != GUARD]
        ids, starts = _placed(self._matching.encode("".join(written), add_special_tokens=False))
        assert starts is not None
        return Encoded(ids, np.asarray([*characters, len(text)], np.int64)[starts])

    def guarded(self, value: Any) -> Any:
        """The JSON value, with a guard inside each control token that its text spells. Raises ValueError for text that
        contains the guard itself."""
        if isinstance(value, str):
            if GUARD in value:
                raise ValueError("the text holds U+FDD1, which is no character")
            return self._spelled.sub(lambda found: found[0][0] + GUARD + found[0][1:], value) if self.control else value
        if isinstance(value, list):
            return [self.guarded(item) for item in value]
        return {key: self.guarded(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _without_places(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        # verbose: a document may be longer than the model's context; it is cut into samples later.
        split = {"split_special_tokens": True} if self.control else {}
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **split,
        )
        return [np.asarray(ids, np.int64) for ids in encoded["input_ids"]]

    def _check(self) -> None:
        forbidden = self.control.keys() - {self._tokenizer.unk_token_id}
        spelled = [text for name in self.control.values() for text in (name, f"a{name}b", f" {name} ")]
        for text, encoded in zip(spelled, self.encode(spelled) if spelled else [], strict=True):
            if found := forbidden & set(encoded.ids.tolist()):
                raise DataError(
                    f"{self._name}: reads the text {text!r} as the control token {self.control[min(found)]!r} and"
                    " offers no other way; give a tokenizer with a tokenizer.json, or set data.control_tokens=true"
                )

    def _refused(self, error: BaseException) -> BaseException:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            text = " ".join(str(error).split())[:300] or type(error).__name__
            return DataError(f"{self._name}: the tokenizer fails on this text ({text}); mend or replace it")
        return error


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    found = {number: str(token.content) for number, token in added.items() if token.special}
    names = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    found |= {number: str(name) for number, name in names if number is not None}
    # Tokens that spell single bytes are text, whatever they are declared as.
    return {number: name for number, name in found.items() if name and not BYTE.fullmatch(name)}


def _renamed(number: int) -> str:
    return f"{NAME}{number}\ufdd0"


def _alternatives(names: Iterable[str]) -> re.Pattern[str]:
    """Longest first, as the library matches."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))))


def _parts(text: str, pattern: re.Pattern[str]) -> Iterable[tuple[int, str]]:
    """The matches and the text between them, each with its position."""
    end = 0
    for found in pattern.finditer(text):
        if found.start() > end:
            yield end, text[end : found.start()]
        yield found.start(), found[0]
        end = found.end()
    if end < len(text):
        yield end, text[end:]


def _copy(core: Tokenizer, control: dict[int, str], *, split: bool) -> Tokenizer:
    """control: tokens to rename. split: do not match special tokens, whatever their name."""
    from tokenizers import Tokenizer

    names = {content: _renamed(number) for number, content in control.items()}
    content = json.loads(core.to_str())
    content.update(truncation=None, padding=None, post_processor=None)
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), *rest] for piece, *rest in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if isinstance(model.get("merges"), list):
        model["merges"] = [pair for pair in model["merges"] if not _makes(pair, names)]
    copied = Tokenizer.from_str(json.dumps(content))
    copied.encode_special_tokens = split
    return copied


def _makes(pair: Any, names: dict[str, str]) -> bool:
    """Whether a merge of BPE reads or writes one of the tokens."""
    left, right = pair if isinstance(pair, list) else str(pair).split(" ", 1)
    return left in names or right in names or left + right in names


def _placed(encoding: Any) -> Encoded:
    starts = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)[:, 0]
    return Encoded(np.asarray(encoding.ids, np.int64), np.maximum.accumulate(starts) if len(starts) else starts)
