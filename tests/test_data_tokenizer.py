"""The byte tokenizer is a real tokenizer, and any other tokenizer is checked before it is used."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from configs.errors import DataError
from configs.load import load_config
from tests.support.data_cases import words
from trainer.data.tokenizer import Encoder, build_byte_tokenizer, build_encoder

TRICKY = [
    "",
    " ",
    "a",
    "tabs\tand\r\nnewlines\n\n\n  , ' . n't ?",
    "<|endoftext|> <0x41> <unk> ##x ▁y Ġz",
    "\x00\x01\x7f",
    "é ñ ß Ω ж 中文 한국어 ไทย हिन्दी",
    "e\u0301 \ufeff\u200b\u2028 \ufffd",
    "😀👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿 \U0010ffff",
]


def encoder_of(*overrides: str, vocab_size: int | None = None) -> Encoder:
    return build_encoder(load_config(overrides), vocab_size=vocab_size)


def random_text(seed: int) -> str:
    draw = random.Random(seed)
    characters = (chr(draw.choice([draw.randrange(128), draw.randrange(0x110000)])) for _ in range(300))
    return "".join(character for character in characters if not 0xD800 <= ord(character) < 0xE000)


@pytest.mark.parametrize("text", [*TRICKY, *map(random_text, range(20))])
def test_bytes_are_their_ids_and_come_back(text: str) -> None:
    encoder = encoder_of()
    ids = encoder.tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert encoder.encode([text])[0].tolist() == ids
    assert encoder.tokenizer.decode(ids) == text
    assert encoder.tokenizer.decode([*ids, 256], skip_special_tokens=True) == text


def test_byte_tokenizer_has_257_tokens() -> None:
    encoder = encoder_of(vocab_size=257)
    assert (encoder.vocabulary, encoder.end, len(encoder.tokenizer)) == (257, 256, 257)


def test_byte_tokenizer_is_loaded_again_from_an_exported_folder(tmp_path: Path) -> None:
    build_byte_tokenizer().save_pretrained(tmp_path)
    LlamaConfig(vocab_size=260).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_id == 256
    for text in TRICKY:
        assert loaded(text)["input_ids"] == list(text.encode())
        assert loaded.decode(loaded(text)["input_ids"]) == text


def save_bpe(folder: Path, *, vocabulary: int = 300, **special: str) -> PreTrainedTokenizerFast:
    """Saves a small byte-level BPE. Like Llama's, it puts <s> before each text unless disabled."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<s>", *special.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(map(words, range(200)), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_any_tokenizer_encodes_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = save_bpe(tmp_path, eos_token="</s>")
    encoder = encoder_of(f"data.tokenizer={tmp_path}", vocab_size=300)
    texts = [words(1), words(2, count=2000)]
    assert encoder.end == tokenizer.convert_tokens_to_ids("</s>")
    assert [ids.tolist() for ids in encoder.encode(texts)] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
    assert encoder.encode(texts)[0][0] != 0


def test_null_takes_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    save_bpe(tmp_path, eos_token="</s>")
    assert encoder_of(f"model.path={tmp_path}").vocabulary == 300
    assert encoder_of(f"model.path={tmp_path}", "data.tokenizer=bytes").vocabulary == 257


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    for name, vocabulary in (("a", 300), ("b", 300), ("c", 310)):
        save_bpe(tmp_path / name, vocabulary=vocabulary, eos_token="</s>")
    a, b, c = (encoder_of(f"data.tokenizer={tmp_path / name}").fingerprint for name in "abc")
    assert a == b
    assert len({a, c, encoder_of().fingerprint}) == 3


def test_without_eos_another_special_token_ends_documents(tmp_path: Path) -> None:
    tokenizer = save_bpe(tmp_path, sep_token="[SEP]")
    assert encoder_of(f"data.tokenizer={tmp_path}").end == tokenizer.sep_token_id


def test_no_token_to_end_documents_with(tmp_path: Path) -> None:
    save_bpe(tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer=.*: has no EOS, SEP or BOS token .*set eos_token"):
        encoder_of(f"data.tokenizer={tmp_path}")


def test_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    save_bpe(tmp_path, eos_token="</s>")
    message = r"has 300 token ids, but the model's vocabulary has 299; set model\.config\.vocab_size=300"
    with pytest.raises(DataError, match=message):
        encoder_of(f"data.tokenizer={tmp_path}", vocab_size=299)
    with pytest.raises(DataError, match=r"^data\.tokenizer=bytes: has 257 token ids"):
        encoder_of(vocab_size=256)


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    empty, broken, file = tmp_path / "empty", tmp_path / "broken", tmp_path / "tokenizer.json"
    empty.mkdir()
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    file.write_text(json.dumps({}))
    for name, rule in (
        (tmp_path / "absent", "no such folder"),
        ("./absent", "no such folder"),
        (empty, "no tokenizer could be loaded"),
        (broken, "no tokenizer could be loaded"),
        (file, "is a file; give the folder"),
    ):
        for key in ("data.tokenizer", "model.path"):
            with pytest.raises(DataError) as caught:
                encoder_of(f"{key}={name}")
            (problem,) = caught.value.problems
            assert problem.startswith(f"{key}={name}: {rule}")
            assert "\n" not in problem


def test_hub_that_cannot_be_reached() -> None:
    """The test runs in its own process, because the libraries read HF_HUB_OFFLINE when they are imported."""
    code = """
from configs.errors import DataError
from tests.support.data_cases import data_of

for overrides in (["data.tokenizer=no/such"], ["data=hub", "data.name=no/such"]):
    try:
        data_of(*overrides)
    except DataError as error:
        print(*error.problems, sep="\\n")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    tokenizer, data_set = finished.stdout.splitlines()
    assert tokenizer.startswith("data.tokenizer=no/such: no tokenizer could be loaded (")
    assert data_set.startswith("data.name=no/such: split train cannot be opened (")


@pytest.mark.timeout(60)
def test_a_pipe_in_a_tokenizer_s_folder_is_refused_at_once(tmp_path: Path) -> None:
    save_bpe(tmp_path, eos_token="</s>")
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=rf"^data\.tokenizer={tmp_path}: {tmp_path}/tokenizer.json is a pipe, which"):
        encoder_of(f"data.tokenizer={tmp_path}")
