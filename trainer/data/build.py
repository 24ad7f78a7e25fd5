"""From configuration to data: which source, which tokenizer, which samples for this rank.

Read next: `paths` and `documents` (files to text), `tokenizer` and `encoding` (text to ids), `cache` (ids to disk),
`samples` (ids to windows), `positions` (which window when, on which rank), `loader` (windows to the loop). `stream` is
for a data set on the hub: windows in one pass. `chat` and `conversations` go from messages to samples.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any

from configs.choices import DataSource
from configs.errors import DataError
from configs.schema import Config
from trainer.data import Batch, DataSet
from trainer.data.agreement import Agreement
from trainer.data.cache import Corpus, TokenisedText, load_tokens
from trainer.data.chat import SUFFIX as CHAT_SUFFIX
from trainer.data.conversations import ConversationSamples, load_conversations
from trainer.data.documents import builtin_files, content_hash
from trainer.data.loader import OrderedSamples, RankData, build_loader
from trainer.data.paths import SUFFIXES, find_files
from trainer.data.positions import Order, Share, key_of
from trainer.data.samples import PackedSamples, SyntheticSamples, TokenArray
from trainer.data.stream import HeldOut, StreamedBatches, TextStream, hold_out, open_stream, take
from trainer.data.tokenizer import Encoder, build_encoder, tokenizer_key, tokenizer_to_export
from trainer.data.workers import check_workers
from trainer.plan.plan import Plan


def build_data(config: Config, plan: Plan, *, data_rank: int, vocab_size: int, local_rank: int = 0) -> DataSet:
    """The data of one rank. A collective where there is a process group.

    data_rank: index among `plan.data_parallel_size`; ranks that hold parts of one replica share it. vocab_size: of
    the model. local_rank 0 goes first on each machine, so that text is tokenised and downloaded once.
    Raises DataError, on all ranks alike, for input that cannot be used.
    """
    data: RankData | None = None
    share = Share(batch=plan.batch, data_rank=data_rank)
    with Agreement() as ranks:
        with ranks.together():
            if local_rank == 0:
                data = _build(config, plan, share, vocab_size)
        with ranks.together():
            data = data or _build(config, plan, share, vocab_size)
        assert data is not None
        ranks.check_equal(data.fingerprint)
    return data


def _build(config: Config, plan: Plan, share: Share, vocab_size: int) -> RankData:
    hub = config.data.source is DataSource.hub
    check_workers(min(1, config.data.num_workers) if hub else config.data.num_workers, plan)
    if config.data.source is DataSource.synthetic:
        return _synthetic(config, plan, share, vocab_size)
    encoder = build_encoder(config, vocab_size=vocab_size)
    if hub:
        return _hub(config, plan, share, encoder)
    if config.data.source is DataSource.chat:
        return _chat(config, plan, share, encoder)
    return _files(config, plan, share, encoder)


def _files(config: Config, plan: Plan, share: Share, encoder: Encoder) -> RankData:
    """`builtin` and `files`: tokens in the cache, windows in a shuffled order."""
    data = config.data
    corpus = _corpus(config)
    text = load_tokens(corpus, encoder, cache_dir=data.cache_dir)
    seq_len = plan.batch.seq_len
    shape: dict[str, Any] = {"seq_len": seq_len, "padding": encoder.end, "separate": data.document_mask}
    training = PackedSamples(tokens=text.training, **shape)
    validation = PackedSamples(tokens=text.validation, **shape)
    _check_enough(config, text)
    epochs = plan.steps * plan.batch.global_batch_size / training.count
    return RankData(
        tokenizer=encoder.tokenizer,
        micro_batches=_shuffled(config, plan, share, training),
        validation_samples=validation,
        eval_samples=config.train.eval_samples,
        share=share,
        fingerprint=text.counts.digest,
        text=(
            f"{_source(config)}: {len(corpus.training) + len(corpus.validation)} file(s),"
            f" {text.counts.documents:,} document(s)"
            f"{f' ({text.counts.skipped:,} empty ones passed over)' if text.counts.skipped else ''},"
            f" {text.training.count:,} tokens in {training.count:,} samples"
            f" ({epochs:.2g} epochs in {plan.steps} steps); validation {text.validation.count:,} tokens in"
            f" {validation.count:,} samples; {_tokenizer(encoder)}"
        ),
    )


def _chat(config: Config, plan: Plan, share: Share, encoder: Encoder) -> RankData:
    """`chat`: conversations in the cache, one or several to a sample, in a shuffled order."""
    data = config.data
    corpus = _corpus(config)
    chats = load_conversations(corpus, encoder, tokenizer_key=tokenizer_key(config), cache_dir=data.cache_dir)
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
    return RankData(
        tokenizer=encoder.tokenizer,
        micro_batches=_shuffled(config, plan, share, training),
        validation_samples=validation,
        eval_samples=config.train.eval_samples,
        share=share,
        fingerprint=chats.digest,
        text=(
            f"chat: {', '.join(data.paths)}: {training.conversations:,} conversation(s) in {training.count:,} samples,"
            f" {filled:.0%} of them filled ({plan.steps * plan.batch.global_batch_size / training.count:.2g} epochs in"
            f" {plan.steps} steps)"
            f"{f'; {left_out:,} left out, too long for data.seq_len={data.seq_len}' if left_out else ''};"
            f" validation {validation.conversations:,} in {validation.count:,} samples; {_tokenizer(encoder)}"
        ),
    )


def _shuffled(
    config: Config, plan: Plan, share: Share, samples: PackedSamples | ConversationSamples
) -> Callable[[int], Iterable[Batch | DataError]]:
    """The loader of a rank's micro-batches from a step on, each epoch in an order of its own."""
    order = Order(count=samples.count, seed=config.train.seed, shuffle=config.data.shuffle)
    return lambda first_step: build_loader(
        OrderedSamples(samples=samples, order=order),
        sampler=share.micro_batches(first_step),
        num_workers=config.data.num_workers,
        pin_memory=plan.device == "cuda",
    )


def _check_conversations(config: Config, training: ConversationSamples, validation: ConversationSamples) -> None:
    data, found = config.data, training.file.count
    if not training.count:
        raise DataError(
            f"data.paths={data.paths}: {found} conversation(s) to train on, none of which reaches a turn of the"
            f" assistant within data.seq_len={data.seq_len} tokens; give more, or a larger data.seq_len"
        )
    if config.train.eval_samples and not validation.count:
        raise DataError(
            f"data.paths={data.paths}: no conversation is left for validation (data.validation_fraction="
            f"{data.validation_fraction}); give more or data.validation_paths, or set train.eval_samples=0"
        )


def _corpus(config: Config) -> Corpus:
    data = config.data
    suffixes, key = SUFFIXES, data.text_key
    if data.source is DataSource.chat:
        suffixes, key = (CHAT_SUFFIX,), data.messages_key
    if data.source is DataSource.builtin:
        return Corpus(
            training=tuple(builtin_files()), validation=(), text_key=data.text_key, fraction=data.validation_fraction
        )
    training = find_files(data.paths, key="data.paths", suffixes=suffixes)
    validation = find_files(data.validation_paths, key="data.validation_paths", suffixes=suffixes)
    # A file to validate on is never trained on, also where a folder or a pattern names it a second time.
    training = [path for path in training if path not in set(validation)]
    if not training:
        raise DataError(
            f"data.paths={data.paths}: names no file that data.validation_paths does not; nothing is left to train on"
        )
    return Corpus(
        training=tuple(training),
        validation=tuple(validation),
        text_key=key,
        fraction=data.validation_fraction,
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


def _hub(config: Config, plan: Plan, share: Share, encoder: Encoder) -> RankData:
    """`hub`: windows cut from the stream as it arrives; the validation text is taken from it beforehand."""
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
    return RankData(
        tokenizer=encoder.tokenizer,
        micro_batches=lambda first_step: build_loader(
            StreamedBatches(
                stream=stream,
                encoder=encoder,
                share=share,
                seed=config.train.seed,
                threshold=held.threshold,
                first_step=first_step,
            ),
            sampler=None,
            # A second process would read and tokenise the same stream once more, and help nothing.
            num_workers=min(1, data.num_workers),
            pin_memory=plan.device == "cuda",
        ),
        validation_samples=validation,
        eval_samples=config.train.eval_samples,
        share=share,
        fingerprint=" ".join(
            [str(content_hash(first)), str(content_hash(str(held.tokens.tolist()))), *map(str, encoder.begin)]
        ),
        text=(
            f"hub: {data.name}{f'/{data.subset}' if data.subset else ''}, split {data.split}, streamed; the run reads"
            f" {plan.batch.tokens * plan.steps:,} tokens; validation {len(held.tokens):,} tokens in"
            f" {validation.count:,} samples from {data.validation_split or 'held-out documents'}; {_tokenizer(encoder)}"
        ),
    )


def _validation_of_stream(config: Config, stream: TextStream, encoder: Encoder, *, seq_len: int) -> HeldOut:
    """Text for `train.eval_samples` samples, from a split of its own or held out of the one that is trained on."""
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


def _synthetic(config: Config, plan: Plan, share: Share, vocab_size: int) -> RankData:
    """`synthetic`: no text at all; a tokenizer is there only to be exported with the model."""
    data, seed = config.data, config.train.seed

    def samples(purpose: int, count: int | None) -> SyntheticSamples:
        return SyntheticSamples(
            seed=key_of(seed, purpose),
            seq_len=plan.batch.seq_len,
            vocab_size=vocab_size,
            ignore_fraction=data.ignore_fraction,
            count=count,
        )

    return RankData(
        tokenizer=tokenizer_to_export(config),
        micro_batches=lambda first_step: build_loader(
            OrderedSamples(samples=samples(0, None), order=None),
            sampler=share.micro_batches(first_step),
            num_workers=data.num_workers,
            pin_memory=plan.device == "cuda",
        ),
        validation_samples=samples(1, None),
        eval_samples=config.train.eval_samples,
        share=share,
        fingerprint="synthetic",
        text=(
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
