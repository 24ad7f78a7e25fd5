"""A document's tokens equal the tokenizer's output for its whole text, followed by EOS."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError, PlanError
from configs.load import load_config
from tests.support.data_cases import corpus_of, data_of, step_rows
from tests.support.tokenizers_built import CONTROL, FAMILIES, save
from tests.test_data_tokenizer import save_bpe
from trainer.data.cache import load_tokens
from trainer.data.documents import PIECE_BYTES, Piece
from trainer.data.encoding import encode_documents
from trainer.data.tokenizer import Encoder, build_encoder

SPELLED = "a document </s> of the<|im_end|>assistant: <s> <think>!"
PARTS = ["hello", " ", "\n", "  ", "world", "x", "é", "def f(x):", "    ", "\n\n\n", "中", "<think>", "</s>", "😀"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def encoder_of(family: str, folder: Path, *overrides: str) -> Encoder:
    save(family, folder)
    return build_encoder(load_config([f"data.tokenizer={folder}", *overrides]), vocab_size=None)


def whole(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return tokenizer(text, split_special_tokens=True, **options)["input_ids"]


def random_text(draw: random.Random, parts: int) -> str:
    return "".join(draw.choices(PARTS, k=parts))


def test_pieces_and_windows_do_not_change_a_token(family: str, tmp_path: Path) -> None:
    """Texts longer than a window are cut anywhere. Some are runs in which no token border is like another."""
    encoder = encoder_of(family, tmp_path)
    draw = random.Random(7)
    texts = [random_text(draw, parts).replace("</s>", "") for parts in (1, 9, 300, 2000)]
    texts += ["a" * 1500, "中" * 1500, " " * 1500, "hello" * 300]
    pieces: list[tuple[int, Piece]] = []
    for number, text in enumerate(texts):
        at = sorted({0, *(draw.randrange(len(text)) for _ in range(len(text) // 150)), len(text)})
        cut = [text[a:b] for a, b in pairwise(at)]
        pieces += [(number, Piece(part, place == len(cut) - 1)) for place, part in enumerate(cut)]
    found: list[list[int]] = [[] for _ in texts]
    given = []
    for number, text, ids in encode_documents(pieces, encoder, characters=2000, window=600, overlap=200):
        found[number] += ids.tolist()
        given.append((number, text))
    assert given == [(number, piece.text) for number, piece in pieces]
    assert found == [whole(encoder.tokenizer, text, add_special_tokens=False) for text in texts]


def test_a_text_file_a_jsonl_row_and_a_stream_hold_what_the_tokenizer_says(family: str, tmp_path: Path) -> None:
    encoder = encoder_of(family, tmp_path / "tokenizer")
    # The text is larger than two pieces, and some lines end within characters that the tokenizer joins.
    text = random_text(random.Random(3), 4 * PIECE_BYTES // 4).replace("</s>", "")
    assert len(text.encode()) > 2 * PIECE_BYTES
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    expected = [*whole(encoder.tokenizer, text), encoder.tokenizer.eos_token_id]
    assert expected[0] == encoder.tokenizer.bos_token_id
    for name in ("a.txt", "a.jsonl"):
        tokens = load_tokens(corpus_of(tmp_path / name, fraction=0), encoder, cache_dir=str(tmp_path / "cache"))
        assert tokens.training.array().tolist() == expected
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    words = ["data=hub", f"data.name={folder}", "train.eval_samples=0", "data.validation_fraction=0"]
    data = data_of(*words, f"data.tokenizer={tmp_path}/tokenizer", "train.micro_batch_size=1")
    streamed = [token for (row,) in step_rows(data, steps=40) for token in row[:16]]
    assert streamed == expected[: len(streamed)]


def test_a_spelled_control_token_is_text(family: str, tmp_path: Path) -> None:
    """`split_special_tokens` alone is not enough for Unigram and WordLevel models, which know the names themselves."""
    encoder = encoder_of(family, tmp_path)
    tokenizer: Any = encoder.tokenizer
    numbers = set(tokenizer.convert_tokens_to_ids(CONTROL)) - {tokenizer.unk_token_id}
    (ids,) = encoder.encode([SPELLED])
    assert not numbers & set(ids.tolist())
    assert encoder.tokenizer.convert_tokens_to_ids("<think>") in ids
    if family in ("byte_level", "whole_text", "word_piece"):
        assert ids.tolist() == whole(encoder.tokenizer, SPELLED, add_special_tokens=False)
    if family == "byte_level":
        assert encoder.tokenizer.decode(ids) == SPELLED
    allowed = encoder_of(family, tmp_path, "data.control_tokens=true")
    (ids,) = allowed.encode([SPELLED])
    assert ids.tolist() == allowed.tokenizer(SPELLED, add_special_tokens=False)["input_ids"]


def test_how_documents_begin(tmp_path: Path) -> None:
    bpe = tmp_path / "bpe"
    tokenizer = save_bpe(bpe, eos_token="</s>")
    assert encoder_with(bpe).begin == (0,)
    assert encoder_with(bpe, "data.bos=always").begin == (0,)
    assert encoder_with(bpe, "data.bos=never").begin == ()
    assert encoder_with(bpe, "data=chat", "data.paths=[a.jsonl]").begin == ()
    # This tokenizer puts nothing before a text, although it has a BOS token.
    tokenizer.backend_tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(tmp_path / "silent")
    assert encoder_with(tmp_path / "silent").begin == ()
    assert encoder_with(tmp_path / "silent", "data.bos=always").begin == (0,)
    # As in OPT, the token that begins a document also ends it.
    opt = save_bpe(tmp_path / "opt", eos_token="<s>")
    assert encoder_with(tmp_path / "opt").begin == (opt.eos_token_id,)
    with pytest.raises(
        DataError, match=r"^data\.document_mask=true: data\.tokenizer=.*opt begins .* set data\.bos=never"
    ):
        encoder_with(tmp_path / "opt", "data.document_mask=true")


def encoder_with(folder: Path, *overrides: str) -> Encoder:
    return build_encoder(load_config([f"data.tokenizer={folder}", *overrides]), vocab_size=None)


def test_every_run_of_a_divided_file_begins_as_a_document(tmp_path: Path) -> None:
    save_bpe(tmp_path / "bpe", eos_token="</s>")
    encoder = encoder_with(tmp_path / "bpe")
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(20_000)))
    text = load_tokens(corpus_of(tmp_path / "a.txt", fraction=0.4), encoder, cache_dir=str(tmp_path / "cache"))
    for side in (text.training, text.validation):
        tokens = side.array().tolist()
        assert tokens[0] == 0
        assert tokens.count(0) == tokens.count(encoder.end) >= 2
        assert all(after == 0 for before, after in pairwise(tokens) if before == encoder.end)


def test_whatever_changes_tokens_changes_the_key_of_the_cache(tmp_path: Path) -> None:
    save_bpe(tmp_path / "bpe", eos_token="</s>")
    (tmp_path / "a.txt").write_text("text")
    options = ([], ["data.bos=never"], ["data.control_tokens=true"])
    keys = {corpus_of(tmp_path / "a.txt").key(encoder_with(tmp_path / "bpe", *option)) for option in options}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.bos=always"], r"^data\.bos=always: data\.tokenizer=bytes has no BOS token; set bos_token in"),
        (["data.control_tokens=true"], r"^data\.control_tokens=true: data\.tokenizer=bytes reads every text as text"),
        (["data=synthetic", "data.bos=never"], r"^data\.bos=never: is for data=builtin or data=files or data=hub,"),
        (["data=chat", "data.paths=[a]", "data.bos=always"], r"^data\.bos=always: is for .*, this is data=chat"),
        (["data=synthetic", "data.control_tokens=true"], r"^data\.control_tokens=true: is for"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(words: list[str], says: str) -> None:
    with pytest.raises((DataError, PlanError), match=says):
        data_of(*words)


def test_text_that_a_tokenizer_fails_on_is_one_line(tmp_path: Path) -> None:
    """A WordLevel model without a token for unknown words raises a bare Exception."""
    save("words_of_a_list", tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["unk_token"] = "absent"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"^data\.tokenizer=.*: the tokenizer fails on this text \(WordLevel error"):
        encoder_with(tmp_path)
