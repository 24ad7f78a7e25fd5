"""Keys of `data`: sources, and how they become samples. `configs.schema` holds all sections."""

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
    """BOS before each document: `auto` (if the tokenizer puts it before a text), `always` or `never`. With `chat` the
    template decides."""
    control_tokens: bool = False
    """A text that spells a control token (`</s>`, `<|im_end|>`) becomes that token. False: it stays text."""
    paths: list[str] = field(default_factory=list)
    """`files`, `chat`: files, folders or glob patterns. Rows are read from .jsonl, .json, .csv (each also with .gz or
    .zst) and .parquet; `files` also reads text from .txt and .md."""
    validation_paths: list[str] = field(default_factory=list)
    """`files`, `chat`: the same for validation; empty: `validation_fraction` of the documents is held out."""
    validation_sets: dict[str, list[str]] = field(default_factory=dict)
    """`files`, `chat`: further validation files, by names of your own: `{code: [code/], prose: [prose.txt]}`. Each gets
    a validation_loss/NAME, and none of it is trained on."""
    validation_fraction: float = 0.05
    """Share of the documents (chosen by a hash of their content) held out for validation."""
    text_key: str = "text"
    """Field of a row that holds the text; `meta.text` is the field `text` inside `meta`."""
    chat_format: ChatFormat = ChatFormat.auto
    """`chat`: form of the rows: `messages`, `sharegpt`, `alpaca` or `completion`. `auto`: detected from the fields."""
    messages_key: str | None = None
    """`chat`: field of a row that holds the list of messages, possibly nested (`chat.messages`). Null: `messages`,
    `conversations` or `conversation`."""
    fields: dict[str, str] = field(default_factory=dict)
    """`chat`: field names in the files: `'data.fields={instruction: question, output: answer.text}'`. `role`, `content`
    and `weight` are fields of a message."""
    roles: dict[str, str] = field(default_factory=dict)
    """`chat`: role of each speaker in the files: `'data.roles={customer: user, agent: assistant}'`."""
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    """`chat`: roles whose messages are trained on. A message's own `weight` (0 or 1) has priority."""
    bad_rows: BadRows = BadRows.refuse
    """`chat`: rows that are not a usable conversation. `refuse`: the first one ends the start. `skip`: they are left
    out and counted."""
    packing: bool = False
    """`chat`: pack several whole conversations into a sample; false: one each, padded."""
    document_mask: bool = False
    """Attention stays inside a document or conversation, whose positions begin at 0 wherever it starts in a sample.
    False: attention also crosses document boundaries within a sample, as is usual in pretraining."""
    name: str | None = None
    """`hub`, and `chat` instead of `paths`: name of the data set, or a local folder that `datasets` can load."""
    subset: str | None = None
    """`hub`, `chat`: configuration of the data set `name`, if it has several."""
    split: str = "train"
    """`hub`, `chat`: training split of `name`."""
    validation_split: str | None = None
    """`hub`, `chat`: validation split of `name`; null: documents held out of `split`, as for files."""
    revision: str | None = None
    """`hub`, `chat`: branch, tag or commit of `name`."""
    shuffle: bool = True
    """Visit samples in an order drawn from `train.seed` (a new one each epoch)."""
    shuffle_buffer: int = 10_000
    """`hub`: size of the streaming shuffle's buffer, in documents."""
    target: str | None = None
    """`custom`: path of a class, package.module.Class, whose objects are the data (docs/python.md)."""
    options: dict[str, Any] = field(default_factory=dict)
    """`custom`: arguments of that class: `data.options.path=corpus.bin`."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Several sources by names of your own, each with a `weight` and its own keys of `data`:
    `data.mixture.code.weight=0.3`, `data.mixture.code.paths=[src/]`. `weight`: its share of the samples, relative to
    the other weights; without any weights an epoch contains every sample of every source once."""
    exhausted: Exhausted = Exhausted.repeat
    """When all samples of a source have been read: `repeat` begins its next epoch, `stop` ends the run."""
    ignore_fraction: float = 0.0
    """`synthetic`: at most this share of each sample's labels is ignored (as prompts are in fine-tuning)."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process. `hub` uses at most one."""
    cache_dir: str = "~/.cache/distributed-training-cookbook"
    """Folder in which tokenised data is kept between runs."""
