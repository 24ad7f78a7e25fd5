"""`data=chat` trains on the right turns and refuses bad rows. Packing neither loses nor splits a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import DataError, PlanError
from tests.support.data_cases import data_of, rows_of_all_ranks
from trainer.data import IGNORED, Batch
from trainer.data.chat import ChatEncoder
from trainer.data.conversations import pack
from trainer.data.formats.common import Reading
from trainer.data.messages import Conversation, read_conversations
from trainer.data.plain_text import PlainText
from trainer.data.tokenizer import Encoder, build_byte_tokenizer

TURN = {"system": "Be brief.", "user": "Say é中 please", "assistant": "é中 é"}
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "</>{% endgeneration %}{% else %}{{ m['content'] }}</>{% endif %}{% endfor %}"
)
# Like templates of reasoning models, it leaves out the thoughts before the last turn.
FORGETFUL = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if loop.last else 'x' }}</>{% endfor %}"


def talk(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": TURN.get(role, "?")} for role in roles]


def write_chats(path: Path, chats: Sequence[list[dict[str, str]]], *, key: str = "messages") -> Path:
    path.write_text("".join(json.dumps({key: chat}) + "\n" for chat in chats))
    return path


def numbered(number: int) -> list[dict[str, str]]:
    """Returns a conversation that is unique to the number and whose length depends on it."""
    turns = talk("user", "assistant") * (1 + number % 3)
    return [{**turn, "content": f"{turn['content']} {number}" + "." * (number % 11)} for turn in turns]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for 60 conversations, some of which are held out."""
    folder = tmp_path_factory.mktemp("chats")
    file = write_chats(folder / "chats.jsonl", [numbered(number) for number in range(60)])
    return ["data=chat", f"data.paths=[{file}]", f"data.cache_dir={folder}/cache", "data.seq_len=400"]


def encoder_of(template: str | None) -> ChatEncoder:
    """Returns an encoder with the byte tokenizer, whose chat template is replaced by the given one."""
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = template
    plain = PlainText(tokenizer, control_tokens=False, name="folder")
    encoder = Encoder(tokenizer=tokenizer, name="folder", vocabulary=257, end=256, fingerprint="", plain=plain)
    return ChatEncoder(encoder, key="data.tokenizer")


def trained_text(chat: ChatEncoder, *roles: str) -> list[str]:
    """Returns the spans of text that are trained on."""
    ids, trained = chat.encode(Conversation(talk(*roles), "chats.jsonl:1"))
    borders = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(int)))
    return [bytes(ids[start:end].tolist()).decode() for start, end in borders.reshape(-1, 2)]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistant_s_turns_are_trained_on(template: str) -> None:
    chat = encoder_of(template)
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    assert trained_text(chat, *roles) == ["é中 é</>", "é中 é</>"]


def test_marks_agree_with_the_tokenizer_s_own_mask() -> None:
    chat = encoder_of(MARKED)
    messages = talk("user", "assistant", "user", "assistant")
    theirs: Any = chat.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = chat.encode(Conversation(messages, ""))
    assert (ids.tolist(), trained.astype(int).tolist()) == (theirs["input_ids"], theirs["assistant_masks"])


def test_a_template_that_rewrites_earlier_turns_is_named() -> None:
    chat = encoder_of(FORGETFUL)
    with pytest.raises(DataError, match=r"chats.jsonl:1: the chat template of data.tokenizer=folder renders message 2"):
        trained_text(chat, "user", "assistant", "user", "assistant")


def test_a_template_that_refuses_is_quoted() -> None:
    chat = encoder_of("{{ raise_exception('no system please') }}")
    with pytest.raises(DataError, match=r"chats.jsonl:1: .* refuses the messages \(no system please\)"):
        trained_text(chat, "user", "assistant")


def test_a_tokenizer_without_a_template_is_reported() -> None:
    with pytest.raises(DataError, match=r"^data.tokenizer=folder: has no chat template .* or set data.tokenizer=bytes"):
        encoder_of(None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r":2: not JSON"),
        ("[]", r':2: not a JSON object but list; write {"messages"'),
        ('{"text": ""}', r":2 has the fields 'text', which are no conversation of a known form \(messages, sharegpt"),
        ('{"messages": []}', r":2 holds no list of messages"),
        ('{"messages": [{"role": "user"}]}', r':2: message 1 is not an object with "role" and "content"'),
        ('{"messages": [{"role": "human", "content": ""}]}', r":2: message 1 has the role 'human'; use one of system"),
        (
            '{"messages": [{"role": "user", "content": ["a"]}]}',
            r":2: message 1 holds a part of its content that is no text \('str'\)",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', r":2: no assistant turn"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', r":2: message 1 holds half a character"),
    ],
)
def test_a_bad_row_is_reported_with_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": talk("user", "assistant")}) + f"\n{line}\n")
    with pytest.raises(DataError, match=says):
        list(read_conversations(file, Reading()))


def test_a_bad_row_leaves_no_entry_in_the_cache(tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", [talk("user", "assistant"), talk("user")])
    with pytest.raises(DataError, match=":2: no assistant turn"):
        data_of("data=chat", f"data.paths=[{file}]", f"data.cache_dir={tmp_path}/cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def conversations_in(batches: list[Batch]) -> list[str]:
    """Returns every conversation of the batches, decoded. Only the assistant's tokens may be labels."""
    found = []
    for batch in batches:
        assert batch.position_ids is not None
        for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in pairwise(starts):
                assert positions[start:end].tolist() == list(range(end - start))
                tokens = [token for token in ids[start:end].tolist() if token != 256]
                found.append(bytes(tokens).decode())
                spoken = bytes(token for token in labels[start:end].tolist() if token != IGNORED).decode()
                parts = found[-1].split("<|im_start|>assistant\n")[1:]
                assert spoken == "".join(part.split("<|im_end|>")[0] + "<|im_end|>" for part in parts)
    return found


def chatml(number: int) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in numbered(number))


def test_packed_and_alone_every_conversation_comes_once(chats: list[str]) -> None:
    samples = {}
    for packing in ("false", "true"):
        data = data_of(*chats, f"data.packing={packing}", "data.document_mask=true", "train.micro_batch_size=1")
        count = int(data.describe().split(" conversation(s) in ")[1].split(" samples")[0])
        trained = conversations_in([batch for step in islice(data.steps(), count) for batch in step])
        held_out = conversations_in(list(data.validation()))
        assert sorted(trained + held_out) == sorted(map(chatml, range(60)))
        assert held_out
        samples[packing] = count
    assert samples["true"] < 0.75 * samples["false"]


def test_ranks_share_the_conversations(chats: list[str]) -> None:
    words = [*chats, "train.micro_batch_size=null", "train.global_batch_size=4"]
    assert rows_of_all_ranks(words, ranks=1, steps=3) == rows_of_all_ranks(words, ranks=2, steps=3)


def test_long_conversations_lose_their_end_or_are_left_out(tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", [talk("user", "assistant"), talk("user", "user", "user", "assistant")])
    words = [f"data.paths=[{file}]", f"data.cache_dir={tmp_path}/cache", "data.validation_fraction=0"]
    data = data_of("data=chat", *words, "data.seq_len=72", "train.eval_samples=0")
    assert "1 conversation(s) in 1 samples" in data.describe()
    assert "1 left out, too long for data.seq_len=72" in data.describe()
    with pytest.raises(DataError, match=r"2 conversation\(s\) to train on, none of which reaches a turn"):
        data_of("data=chat", *words, "data.seq_len=16", "train.eval_samples=0")


def test_packing_wastes_little_and_overfills_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    kept = np.flatnonzero(lengths % 7)
    samples = pack(lengths, kept, seq_len=128)
    assert sorted(number for sample in samples for number in sample) == kept.tolist()
    assert max(lengths[sample].sum() for sample in samples) <= 128
    assert len(samples) <= 1.05 * lengths[kept].sum() / 128


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=chat"], r"^data.paths=\[\]: data=chat needs"),
        (["data.packing=true"], r"^data.packing=true: is for data=chat, this is data=builtin"),
        (["data=synthetic", "data.document_mask=true"], r"^data.document_mask=true: data=synthetic has no documents"),
        (["data.document_mask=true", "parallel=context"], r"^data.document_mask=true: parallel.cp=2 brings its own"),
    ],
)
def test_impossible_choices_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        data_of(*words)
