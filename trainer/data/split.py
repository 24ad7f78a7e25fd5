"""One split of a data set on the hub, or of a local folder that `datasets` can load, for `data=chat`: read completely.

Its rows are those of a table, and a null inside lists and objects is an absent field, as in parquet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError, first_line
from configs.schema_data import Data
from trainer.data.paths import files_inside
from trainer.data.rows import Rows, sparse


@dataclass(frozen=True, kw_only=True)
class Split:
    """identity: changes with the rows. stream: stream of `datasets`."""

    data: Data
    name: str
    identity: tuple[Any, ...]
    stream: Any

    def __str__(self) -> str:
        return f"split {self.name}"

    def rows(self) -> Rows:
        number = 0
        try:
            for number, row in enumerate(self.stream, start=1):
                yield f"{self}, row {number}", sparse(row)
        except (DataError, GeneratorExit):
            raise
        # The libraries below raise their own errors: of HTTP, of Arrow, and ValueError.
        except Exception as error:
            raise DataError(f"data.paths: {self}, row {number + 1} cannot be read ({first_line(error)})") from None


def open_split(data: Data, name: str) -> Split:
    """Raises DataError if the data set, the subset or the split cannot be reached or does not exist."""
    from trainer.data.stream import open_stream

    stream = open_stream(data, split=name)
    local = Path(os.path.expanduser(data.name or ""))
    if local.exists():
        found = files_inside(local) if local.is_dir() else [local]
        state = [(str(file), status.st_size, status.st_mtime_ns) for file in found if (status := file.stat())]
    else:
        state = [_revision(data)]
    return Split(data=data, name=name, identity=(data.name, data.subset, name, *state), stream=stream)


def _revision(data: Data) -> tuple[str, ...]:
    """The current commit of a name on the hub, and the selected files."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(data.name), data.subset, revision=data.revision)
    # As `open_stream`, which has reached the hub a moment before.
    except Exception as error:
        raise DataError(
            f"data.name={data.name}: the hub does not say which commit it is ({first_line(error)}); try again, or"
            " give a local folder"
        ) from None
    return str(builder.hash), builder.config_id
