"""Problems of the data's keys, each in one line. Torch-free.

READ_BY lists the sources that read a key: a key that no source of the run reads is refused, since it has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from configs.choices import DataSource, Exhausted
from configs.schema import Config
from configs.schema_data import Data
from configs.schema_train import Samples
from trainer.data import custom, mixture
from trainer.data.formats.rules import check_reading

CHAT, HUB = (DataSource.chat,), (DataSource.hub,)
FILES = (DataSource.files, DataSource.chat)
DOCUMENTS = (DataSource.builtin, DataSource.files, DataSource.hub)
TEXT = (*DOCUMENTS, DataSource.chat)
NAMED = (DataSource.hub, DataSource.chat)
READ_BY: Mapping[str, Sequence[DataSource]] = MappingProxyType(
    {
        "bos": DOCUMENTS,
        "control_tokens": TEXT,
        **dict.fromkeys(("validation_fraction", "shuffle"), (*TEXT, DataSource.custom)),
        **dict.fromkeys(("paths", "validation_paths"), FILES),
        "text_key": (DataSource.files, DataSource.hub),
        **dict.fromkeys(("packing", "messages_key", "chat_format", "fields", "roles", "train_roles", "bad_rows"), CHAT),
        **dict.fromkeys(("name", "subset", "split", "validation_split", "revision"), NAMED),
        "shuffle_buffer": HUB,
        "ignore_fraction": (DataSource.synthetic,),
        **dict.fromkeys(("target", "options"), (DataSource.custom,)),
    }
)
"""Keys of `data` that only some sources read."""
EVERYWHERE = ("source", "mixture", "exhausted", "seq_len", "tokenizer", "num_workers", "cache_dir")
"""Keys that hold for all sources. `cache_dir` is a place, used whenever something is cached."""
ON_CONDITION = ("document_mask", "validation_sets")
"""Keys with a rule of their own below."""
OF_A_NAME = ("subset", "split", "validation_split", "revision")


def check_data(config: Config) -> Iterator[str]:
    if problems := list(mixture.problems(config)):
        yield from problems
        return
    parts = mixture.parts(config)
    yield from mixture.problems_of_parts(parts)
    for part in parts:
        yield from (part.label + problem for problem in _check_source(part.config))
    yield from _check_validation_sets(config)
    yield from _check_samples(config, parts)
    endless = [part.config.data.source for part in parts if part.endless]
    if endless and config.data.exhausted is Exhausted.stop:
        yield f"data.exhausted=stop: the end of data={endless[0]} is not known; set it to repeat"
    if endless and config.train.epochs:
        yield (
            f"train.epochs={config.train.epochs:g}: how many samples data={endless[0]} has is not known; give"
            " train.steps"
        )


def _check_source(config: Config) -> Iterator[str]:
    data = config.data
    if data.source in FILES and not data.paths and (data.source not in NAMED or data.name is None):
        or_named = ", or data.name=NAME of a data set" if data.source in NAMED else ""
        yield (
            f"data.paths=[]: data={data.source} needs at least one file, folder or pattern: data.paths=[corpus/]"
            f"{or_named}"
        )
    if data.source is DataSource.hub and data.name is None:
        yield "data.name=null: data=hub needs the name of a data set, or a local folder of one"
    if data.source is DataSource.custom:
        yield from custom.problems(config)
    usual = Data()
    for key, sources in READ_BY.items():
        value = getattr(data, key)
        if value != getattr(usual, key) and data.source not in sources:
            yield _of_another_source(key, value, data.source, sources)
    yield from _check_idle(data)
    yield from check_reading(data)
    yield from _check_document_mask(config)


def _check_idle(data: Data) -> Iterator[str]:
    """Keys that another key of the same source makes ineffective."""
    usual = Data()
    if data.source is DataSource.chat and data.name is not None and data.paths:
        yield f"data.name={data.name}: data.paths={data.paths} says what is read; give one of them"
    for key in OF_A_NAME:
        value = getattr(data, key)
        if data.source is DataSource.chat and data.name is None and value != getattr(usual, key):
            yield f"data.{key}={value}: is of the data set that data.name names; set that, or leave it out"
    if data.validation_paths and data.validation_split:
        yield (
            f"data.validation_split={data.validation_split}: data.validation_paths={data.validation_paths} says what is"
            " validated on; give one of them"
        )
    apart = "validation_paths" if data.source in FILES and data.validation_paths else "validation_split"
    # 0 says the same: nothing is held out.
    if data.validation_fraction not in (0, usual.validation_fraction) and (
        data.validation_paths or data.validation_split
    ):
        yield (
            f"data.validation_fraction={data.validation_fraction}: data.{apart}={getattr(data, apart)} says what is"
            " validated on, and nothing is held out; give one of them"
        )


def _of_another_source(key: str, value: Any, given: DataSource, sources: Sequence[DataSource]) -> str:
    shown = str(value).lower() if isinstance(value, bool) else value
    if len(sources) >= len(TEXT):
        without = " and ".join(f"data={source}" for source in DataSource if source not in sources)
        return f"data.{key}={shown}: is for all but {without}, this is data={given}; choose other data, or leave it out"
    names = " or ".join(f"data={source}" for source in sources)
    return f"data.{key}={shown}: is for {names}, this is data={given}; choose {names}, or leave it out"


def _check_validation_sets(config: Config) -> Iterator[str]:
    """They are read with the settings of `data` itself, even if a mixture is trained on."""
    data, sets = config.data, config.data.validation_sets
    if sets and data.source not in FILES:
        yield _of_another_source("validation_sets", sets, data.source, FILES)
    if sets and not config.train.eval_samples:
        yield (
            f"data.validation_sets={sets}: train.eval_samples=0 validates on nothing; set it above 0, or leave this out"
        )
    for name, paths in sets.items():
        yield from mixture.check_name("data.validation_sets", name)
        if not paths:
            yield f"data.validation_sets.{name}=[]: names no file; name one, or leave the set out"


def _check_samples(config: Config, parts: Sequence[mixture.Part]) -> Iterator[str]:
    """Texts that the model generates after a validation."""
    train, asked, usual = config.train, config.train.samples, Samples()
    given = {"prompts": asked.prompts, "from_validation": asked.from_validation}
    for key, value in ((key, value) for key, value in given.items() if value):
        if not train.eval_samples:
            yield (
                f"train.samples.{key}={value}: are written after a validation, and train.eval_samples=0 makes none; set"
                " it above 0, or leave this out"
            )
        for part in parts:
            if part.config.data.source is DataSource.synthetic:
                yield f"train.samples.{key}={value}: {part.label}data=synthetic is no text; leave it out"
    if asked.from_validation > train.eval_samples > 0:
        yield (
            f"train.samples.from_validation={asked.from_validation}: train.eval_samples={train.eval_samples} validates"
            " on fewer; use that number or less"
        )
    for key in ("tokens", "temperature"):
        value = getattr(asked, key)
        if value != getattr(usual, key) and not any(given.values()):
            yield (
                f"train.samples.{key}={value}: there is nothing to go on from; set train.samples.prompts or"
                " train.samples.from_validation, or leave it out"
            )
    if any(given.values()) and asked.tokens >= config.data.seq_len:
        yield (
            f"train.samples.tokens={asked.tokens}: prompt and text are one sequence of data.seq_len="
            f"{config.data.seq_len} at most; use fewer"
        )


def _check_document_mask(config: Config) -> Iterator[str]:
    if not config.data.document_mask:
        return
    if config.data.source in (DataSource.synthetic, DataSource.custom):
        yield (
            f"data.document_mask=true: data={config.data.source} has no documents; choose other data, or set it to"
            " false"
        )
    if config.parallel.cp > 1:
        yield (
            f"data.document_mask=true: parallel.cp={config.parallel.cp} brings its own attention, which knows no"
            " documents; use parallel.cp=1, or set it to false"
        )
