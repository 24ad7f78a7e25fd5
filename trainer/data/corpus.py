"""The files, or the splits of a data set, that `builtin`, `files` and `chat` read."""

from __future__ import annotations

from configs.choices import DataSource
from configs.errors import DataError
from configs.schema import Config
from trainer.data.cache import Corpus
from trainer.data.documents import builtin_files
from trainer.data.paths import ROW_SUFFIXES, SUFFIXES, find_files
from trainer.data.split import open_split


def corpus_of(config: Config) -> Corpus:
    """Input of `builtin`, `files` and `chat`. Raises DataError if it cannot be found, or is empty."""
    data = config.data
    suffixes = ROW_SUFFIXES if data.source is DataSource.chat else SUFFIXES
    if data.source is DataSource.builtin:
        return Corpus(
            training=tuple(builtin_files()), validation=(), text_key=data.text_key, fraction=data.validation_fraction
        )
    validation = find_files(data.validation_paths, key="data.validation_paths", suffixes=suffixes)
    if data.name is not None:
        splits = [] if data.validation_split is None else [open_split(data, data.validation_split)]
        return Corpus(
            training=(open_split(data, data.split),),
            validation=(*splits, *validation),
            text_key=data.text_key,
            fraction=data.validation_fraction,
        )
    training = find_files(data.paths, key="data.paths", suffixes=suffixes)
    # A validation file is never trained on, even if a folder or a pattern names it a second time.
    kept = {*validation}
    for name, paths in data.validation_sets.items():
        # A source of a mixture may read fewer kinds of files than these sets.
        kept |= set(find_files(paths, key=f"data.validation_sets.{name}", suffixes=SUFFIXES))
    training = [path for path in training if path not in kept]
    if not training:
        raise DataError(
            f"data.paths={data.paths}: names no file that data.validation_paths does not; nothing is left to train on"
        )
    return Corpus(
        training=tuple(training),
        validation=tuple(validation),
        text_key=data.text_key,
        fraction=data.validation_fraction,
    )
