"""From configuration to data: which source, which tokenizer, which samples for this rank.

Read next: `paths` and `documents` (files to text), `tokenizer` and `encoding` (text to ids), `cache` (ids to disk),
`samples` (ids to windows), `positions` (which window when, on which rank), `loader` (windows to the loop). `stream` and
`windows` are for a data set on the hub: windows in one pass. `chat` and `conversations` go from messages to samples.
`mixture` defines several sources, `mixed` reads them as one.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

from configs.choices import BadRows, ChatFormat, DataSource
from configs.errors import DataError
from configs.schema import Config
from configs.schema_data import Data
from trainer.data import DataSet, mixture
from trainer.data.agreement import Agreement
from trainer.data.cache import TokenisedText, load_tokens
from trainer.data.conversations import ConversationSamples, load_conversations
from trainer.data.corpus import corpus_of
from trainer.data.custom.read import custom_source
from trainer.data.documents import content_hash
from trainer.data.formats.common import Reading
from trainer.data.loader import OrderedSamples, RankData, Source
from trainer.data.mixed import blend
from trainer.data.positions import Order, Share, key_of
from trainer.data.samples import PackedSamples, Samples, SyntheticSamples, TokenArray
from trainer.data.stream import HeldOut, TextStream, hold_out, open_stream, take
from trainer.data.tokenizer import Encoder, build_encoder, tokenizer_key, tokenizer_to_export
from trainer.data.windows import StreamedSamples
from trainer.data.workers import check_workers
from trainer.plan.length import steps_of
from trainer.plan.plan import Plan


def build_data(config: Config, plan: Plan, *, data_rank: int, vocab_size: int, local_rank: int = 0) -> DataSet:
    """The data of one rank. A collective if there is a process group.

    data_rank: index among `plan.data_parallel_size`; ranks that hold parts of one replica share it. vocab_size: of the
    model. local_rank 0 goes first on each machine, so text is tokenised and downloaded once. Raises DataError, on all
    ranks alike, for unusable input.
    """
    found: Source | None = None
    with Agreement() as ranks:
        with ranks.together():
            if local_rank == 0:
                found = _build(config, plan, vocab_size)
        with ranks.together():
            found = found or _build(config, plan, vocab_size)
        assert found is not None
        ranks.check_equal(found.fingerprint)
        with ranks.together():
            sets = _validation_sets(config, plan, vocab_size)
        ranks.check_equal(found.fingerprint + "".join(sets[name][0] for name in sets))
    length = steps_of(config, plan.batch, count=found.count, until_exhausted=found.until_exhausted)
    return RankData(
        source=found,
        sets={name: samples for name, (_, samples) in sets.items()},
        share=Share(batch=plan.batch, data_rank=data_rank),
        eval_samples=config.train.eval_samples,
        length=length,
        num_workers=config.data.num_workers,
        pin_memory=plan.device == "cuda",
    )


def _build(config: Config, plan: Plan, vocab_size: int) -> Source:
    """Each source as if it was the only one, and then all of them as one."""
    parts = mixture.parts(config)
    streams = any(part.config.data.source is DataSource.hub for part in parts)
    check_workers(min(1, config.data.num_workers) if streams else config.data.num_workers, plan)
    found: list[Source] = []
    problems: list[str] = []
    for part in parts:
        try:
            found.append(_source_of(part.config, plan, vocab_size))
        except DataError as error:
            problems += [part.label + problem for problem in error.problems]
    if problems:
        raise DataError(*problems)
    return blend(parts, found, seed=config.train.seed)


def _validation_sets(config: Config, plan: Plan, vocab_size: int) -> dict[str, tuple[str, Samples]]:
    """By name the fingerprint and the samples of each, read with the settings of `data` itself."""
    found: dict[str, tuple[str, Samples]] = {}
    problems: list[str] = []
    for name, paths in config.data.validation_sets.items():
        only = {"paths": paths, "validation_paths": [], "validation_sets": {}, "validation_fraction": 0.0}
        only |= {"name": None, "validation_split": None}
        data, train = replace(config.data, **only), replace(config.train, eval_samples=0)
        try:
            source = _source_of(replace(config, data=data, train=train), plan, vocab_size)
        except DataError as error:
            lines = [line.replace("data.paths", f"data.validation_sets.{name}") for line in error.problems]
            problems += [line.replace(" to train on", "") for line in lines]
            continue
        assert isinstance(source.reading, OrderedSamples)
        found[name] = source.fingerprint, source.reading.samples
    if problems:
        raise DataError(*problems)
    return found


def _source_of(config: Config, plan: Plan, vocab_size: int) -> Source:
    if config.data.source is DataSource.synthetic:
        return _synthetic(config, plan, vocab_size)
    if config.data.source is DataSource.custom:
        return custom_source(config, seq_len=plan.batch.seq_len, vocab_size=vocab_size)
    encoder = build_encoder(config, vocab_size=vocab_size)
    if config.data.source is DataSource.hub:
        return _hub(config, plan, encoder)
    if config.data.source is DataSource.chat:
        return _chat(config, plan, encoder)
    return _files(config, plan, encoder)


def _files(config: Config, plan: Plan, encoder: Encoder) -> Source:
    """`builtin` and `files`: tokens in the cache, windows in a shuffled order."""
    data = config.data
    corpus = corpus_of(config)
    text = load_tokens(corpus, encoder, cache_dir=data.cache_dir)
    seq_len = plan.batch.seq_len
    shape: dict[str, Any] = {"seq_len": seq_len, "padding": encoder.end, "separate": data.document_mask}
    training = PackedSamples(tokens=text.training, **shape)
    validation = PackedSamples(tokens=text.validation, **shape)
    _check_enough(config, text)
    return Source(
        tokenizer=encoder.tokenizer,
        reading=_shuffled(config, training),
        validation=validation,
        count=training.count,
        until_exhausted=training.count,
        fingerprint=text.counts.digest,
        text=lambda samples, steps: (
            f"{_source(config)}: {len(corpus.training) + len(corpus.validation)} file(s),"
            f" {text.counts.documents:,} document(s)"
            f"{f' ({text.counts.skipped:,} empty ones passed over)' if text.counts.skipped else ''},"
            f" {text.training.count:,} tokens in {training.count:,} samples"
            f" ({samples / training.count:.2g} epochs in {steps} steps); validation {text.validation.count:,} tokens in"
            f" {validation.count:,} samples; {_tokenizer(encoder)}"
        ),
    )


def _chat(config: Config, plan: Plan, encoder: Encoder) -> Source:
    """`chat`: conversations in the cache, one or several to a sample, in a shuffled order."""
    data = config.data
    corpus, where = corpus_of(config), data.name or ", ".join(data.paths)
    chats = load_conversations(
        corpus, encoder, _reading(data), tokenizer_key=tokenizer_key(config), cache_dir=data.cache_dir
    )
    shape: dict[str, Any] = {
        "seq_len": plan.batch.seq_len,
        "padding": encoder.end,
        "packing": data.packing,
        "separate": data.document_mask,
    }
    training = ConversationSamples(file=chats.training, **shape)
    validation = ConversationSamples(file=chats.validation, **shape)
    _check_conversations(config, training, validation)
    left_out = chats.training.count - training.conversations
    filled = training.tokens / (training.count * plan.batch.seq_len)
    return Source(
        tokenizer=encoder.tokenizer,
        reading=_shuffled(config, training),
        validation=validation,
        count=training.count,
        until_exhausted=training.count,
        fingerprint=chats.digest,
        text=lambda samples, steps: (
            f"chat: {where}, {chats.describe()}:"
            f" {training.conversations:,} conversation(s) in {training.count:,} samples,"
            f" {filled:.0%} of them filled ({samples / training.count:.2g} epochs in {steps} steps)"
            f"{f'; {left_out:,} left out, too long for data.seq_len={data.seq_len}' if left_out else ''};"
            f" validation {validation.conversations:,} in {validation.count:,} samples; {_tokenizer(encoder)}"
        ),
    )


def _reading(data: Data) -> Reading:
    """How `chat` reads rows."""
    return Reading(
        key=data.messages_key,
        form=None if data.chat_format is ChatFormat.auto else str(data.chat_format),
        fields=data.fields,
        roles=data.roles,
        trained=tuple(data.train_roles),
        skip=data.bad_rows is BadRows.skip,
    )


def _shuffled(config: Config, samples: PackedSamples | ConversationSamples) -> OrderedSamples:
    """Each epoch in its own order."""
    order = Order(count=samples.count, seed=config.train.seed, shuffle=config.data.shuffle)
    return OrderedSamples(samples=samples, order=order)


def _check_conversations(config: Config, training: ConversationSamples, validation: ConversationSamples) -> None:
    data, found = config.data, training.file.count
    where = f"data.paths={data.paths}" if data.name is None else f"data.name={data.name}"
    if not training.count:
        raise DataError(
            f"{where}: {found} conversation(s) to train on, none of which reaches a turn of the"
            f" assistant within data.seq_len={data.seq_len} tokens; give more, or a larger data.seq_len"
        )
    other = "data.validation_paths" if data.name is None else "data.validation_split"
    if config.train.eval_samples and not validation.count:
        raise DataError(
            f"{where}: no conversation is left for validation (data.validation_fraction="
            f"{data.validation_fraction}); give more or {other}, or set train.eval_samples=0"
        )


def _check_enough(config: Config, text: TokenisedText) -> None:
    data, tokens = config.data, text.training.count
    where = "data.source=builtin" if data.source is DataSource.builtin else f"data.paths={data.paths}"
    if tokens + text.validation.count == 0:
        raise DataError(
            f"{where}: every file is empty ({text.counts.skipped} of them or of their rows); give files that hold text"
        )
    if tokens <= data.seq_len:
        raise DataError(
            f"{where}: {tokens} tokens to train on do not fill one sample of data.seq_len={data.seq_len} + 1;"
            f" give more text, or set data.seq_len={max(2, tokens - 1)} or less"
        )
    if config.train.eval_samples and text.validation.count < 2:
        raise DataError(
            f"{where}: no text is left for validation (data.validation_fraction={data.validation_fraction} of"
            f" {text.counts.documents} document(s), {tokens} tokens); give more text or data.validation_paths, or set"
            " train.eval_samples=0"
        )


def _hub(config: Config, plan: Plan, encoder: Encoder) -> Source:
    """`hub`: windows cut from the stream as it arrives; the validation text is taken from it first."""
    data, seq_len = config.data, plan.batch.seq_len
    stream = TextStream(rows=open_stream(data, split=data.split), data=data, split=data.split)
    first = next(stream.texts(), None)
    if first is None:
        raise DataError(
            f"data.name={data.name}: split {data.split} holds no text in {data.text_key}; choose another split"
        )
    held = _validation_of_stream(config, stream, encoder, seq_len=seq_len)
    row = TokenArray(tokens=held.tokens)
    validation = PackedSamples(tokens=row, seq_len=seq_len, padding=encoder.end, separate=data.document_mask)
    shuffled = f"shuffle_buffer={data.shuffle_buffer}" if data.shuffle else "as it stands"
    return Source(
        tokenizer=encoder.tokenizer,
        reading=StreamedSamples(
            stream=stream, encoder=encoder, seq_len=seq_len, seed=config.train.seed, threshold=held.threshold
        ),
        validation=validation,
        count=None,
        fingerprint=" ".join(
            [shuffled, str(content_hash(first)), str(content_hash(str(held.tokens.tolist()))), *map(str, encoder.begin)]
        ),
        text=lambda samples, _: (
            f"hub: {data.name}{f'/{data.subset}' if data.subset else ''}, split {data.split}, streamed; the run reads"
            f" {samples * seq_len:,} tokens; validation {len(held.tokens):,} tokens in"
            f" {validation.count:,} samples from {data.validation_split or 'held-out documents'}; {_tokenizer(encoder)}"
        ),
    )


def _validation_of_stream(config: Config, stream: TextStream, encoder: Encoder, *, seq_len: int) -> HeldOut:
    """Text for `train.eval_samples` samples, from a separate split or held out of the training split."""
    data, samples = config.data, config.train.eval_samples
    split = data.validation_split or data.split
    tokens = samples * seq_len + 1 if samples else 0
    if data.validation_split is not None:
        texts = TextStream(rows=open_stream(data, split=split), data=data, split=split).texts()
        held = HeldOut(tokens=take(texts, encoder, tokens=tokens), threshold=0)
    else:
        held = hold_out(stream, encoder, fraction=data.validation_fraction, tokens=tokens)
    if samples and len(held.tokens) < 2:
        raise DataError(
            f"data.name={data.name}: split {split} gave no text for validation (data.validation_fraction="
            f"{data.validation_fraction}); set data.validation_split, or train.eval_samples=0"
        )
    return held


def _synthetic(config: Config, plan: Plan, vocab_size: int) -> Source:
    """`synthetic`: no text at all; a tokenizer only serves for the model's export."""
    data, seed = config.data, config.train.seed

    def samples(purpose: int, count: int | None) -> SyntheticSamples:
        return SyntheticSamples(
            seed=key_of(seed, purpose),
            seq_len=plan.batch.seq_len,
            vocab_size=vocab_size,
            ignore_fraction=data.ignore_fraction,
            count=count,
        )

    return Source(
        tokenizer=tokenizer_to_export(config),
        reading=OrderedSamples(samples=samples(0, None), order=None),
        validation=samples(1, None),
        count=None,
        fingerprint="synthetic",
        text=lambda *_: (
            f"synthetic: made on the fly, {vocab_size:,} token ids,"
            f" up to {data.ignore_fraction:.0%} of a sample's labels ignored"
        ),
    )


def _source(config: Config) -> str:
    if config.data.source is DataSource.builtin:
        return f"builtin: the source text of Python {platform.python_version()}"
    return f"files: {', '.join(config.data.paths)}"


def _tokenizer(encoder: Encoder) -> str:
    begin = f"; documents begin with {encoder.tokenizer.decode(list(encoder.begin))}" if encoder.begin else ""
    return f"tokenizer {encoder.name} ({encoder.vocabulary:,} tokens){begin}"
