"""Keys of the data: what is read, and how it becomes samples. `configs.schema` holds all sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.choices import BadRows, Bos, ChatFormat, DataSource, Exhausted


@dataclass(kw_only=True, slots=True)
class Data:
    source: DataSource = DataSource.builtin
    """`builtin` (the Python standard library's source text), `files`, `chat` (conversations), `hub`, `synthetic`, or
    `custom` (a class of your own)."""
    seq_len: int = 256
    """Tokens per sequence."""
    tokenizer: str | None = None
    """`bytes`, a local folder or a hub id. Null: that of `model.path` if set, else `bytes`."""
    bos: Bos = Bos.auto
    """BOS before each document: `auto` (where the tokenizer puts it before a text), `always` or `never`. The template
    decides for `chat`."""
    control_tokens: bool = False
    """Text that spells a control token (`</s>`, `<|im_end|>`) becomes that token. False: it stays text."""
    paths: list[str] = field(default_factory=list)
    """`files`, `chat`: files, folders or glob patterns. Rows are read from .jsonl, .json, .csv (also with .gz or .zst
    behind) and .parquet; for `files`, text also from .txt and .md."""
    validation_paths: list[str] = field(default_factory=list)
    """`files`, `chat`: the same for validation; empty: `validation_fraction` of the documents is held out."""
    validation_sets: dict[str, list[str]] = field(default_factory=dict)
    """`files`, `chat`: further files to validate on, by names of your own: `{code: [code/], prose: [prose.txt]}`. Each
    has a validation_loss/NAME, and none of it is trained on."""
    validation_fraction: float = 0.05
    """Part of the documents (chosen by a hash of their content) held out for validation."""
    text_key: str = "text"
    """Field of a row that holds the text; `meta.text` is the field `text` inside of `meta`."""
    chat_format: ChatFormat = ChatFormat.auto
    """`chat`: the form of the rows: `messages`, `sharegpt`, `alpaca` or `completion`. `auto`: its fields say it."""
    messages_key: str | None = None
    """`chat`: field of a row that holds the list of messages, which may be inside of others (`chat.messages`). Null:
    `messages`, `conversations` or `conversation`."""
    fields: dict[str, str] = field(default_factory=dict)
    """`chat`: the names that fields have in the files: `'data.fields={instruction: question, output: answer.text}'`.
    `role`, `content` and `weight` are fields of a message."""
    roles: dict[str, str] = field(default_factory=dict)
    """`chat`: who speaks in the files, and which role that is: `'data.roles={customer: user, agent: assistant}'`."""
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    """`chat`: whose messages are trained on. A message's own `weight` (0 or 1) counts before that."""
    bad_rows: BadRows = BadRows.refuse
    """`chat`: rows that are no usable conversation. `refuse`: the first one ends the start. `skip`: they are left out
    and counted."""
    packing: bool = False
    """`chat`: several whole conversations in one sample; false: one each, filled up with padding."""
    document_mask: bool = False
    """Attention stays inside a document or conversation, whose positions begin at 0 wherever it stands in a sample.
    False: attention also crosses document boundaries within a sample, as is usual in pretraining."""
    name: str | None = None
    """`hub`, and `chat` instead of `paths`: the name of the data set, or a local folder that `datasets` can load."""
    subset: str | None = None
    """`hub`, `chat`: the configuration of the data set `name`, where it has several."""
    split: str = "train"
    """`hub`, `chat`: the split of `name` to train on."""
    validation_split: str | None = None
    """`hub`, `chat`: the split of `name` to validate on; null: documents held out of `split`, as for files."""
    revision: str | None = None
    """`hub`, `chat`: branch, tag or commit of `name`."""
    shuffle: bool = True
    """Visit samples in an order drawn from `train.seed` (a new one each epoch)."""
    shuffle_buffer: int = 10_000
    """`hub`: documents held in the streaming shuffle's buffer."""
    target: str | None = None
    """`custom`: the path of a class, package.module.Class, whose objects are the data (docs/python.md)."""
    options: dict[str, Any] = field(default_factory=dict)
    """`custom`: the arguments of that class: `data.options.path=corpus.bin`."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Several sources by names of your own, each with a `weight` and with keys of `data` that it has for itself:
    `data.mixture.code.weight=0.3`, `data.mixture.code.paths=[src/]`. `weight`: its part of the samples, relative to the
    other weights; with no weights at all every sample of every source comes once in an epoch."""
    exhausted: Exhausted = Exhausted.repeat
    """When all samples of a source have been read: `repeat` begins its next epoch, `stop` ends the run."""
    ignore_fraction: float = 0.0
    """`synthetic`: up to this part of each sample's labels is ignored (as prompts are in fine-tuning)."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process. `hub` uses at most one."""
    cache_dir: str = "~/.cache/distributed-training-cookbook"
    """Where tokenised data is kept between runs."""
