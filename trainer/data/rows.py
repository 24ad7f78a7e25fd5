"""Rows of a file of records: JSON objects, lines of CSV or rows of parquet, each with its place.

    .jsonl      one object per line
    .json       an array of objects, or objects one after the other
    .csv        the first line names the columns; every value is text
    .parquet    a row of a table; lists and structs are lists and objects

The first three may be compressed: .gz or .zst after the suffix. A nested field is named by its path: `meta.text` is
{"meta": {"text": ...}}, unless the row has a field whose whole name is `meta.text`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from configs.errors import DataError, first_line

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
"""Each row with its place: FILE:LINE, also with the number of the record if a line may hold several."""

BOM = b"\xef\xbb\xbf"
BLANK = re.compile(r"[ \t\r\n]*")
LONGEST_CELL = 2**31 - 1
ABSENT = object()


def read_rows(path: Path, *, example: str, column: str | None = None) -> Rows:
    """The rows of the file; empty lines are skipped.

    example: a valid row. column: the only field that is needed, if the file can read it alone. Raises DataError with
    the place of malformed content, and OSError for an unreadable file.
    """
    kind, compression = _kind(path)
    if kind == ".parquet":
        yield from _read_parquet(path, column)
        return
    try:
        with _open(path, compression) as file:
            yield from READERS[kind](path, file, example)
    except (EOFError, zlib.error, OSError) as error:
        # The decompression libraries give no error number for bad content.
        if compression and getattr(error, "errno", None) is None:
            raise DataError(
                f"data.paths: {path} is not a sound {compression} file ({first_line(error)}); write it again"
            ) from None
        raise


def is_rows(path: Path) -> bool:
    return _kind(path)[0] in (*READERS, ".parquet")


def value_of(row: Row, name: str) -> Any:
    """The value of a field, or of a nested one (`meta.text`); ABSENT if there is none."""
    if name in row or "." not in name:
        return row.get(name, ABSENT)
    value: Any = row
    for part in name.split("."):
        value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def names_of(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"


def not_text(path: Path, what: str) -> str:
    return f"data.paths: {path} is not UTF-8 text ({what}); convert it to UTF-8, or leave it out"


def _kind(path: Path) -> tuple[str, str]:
    """The suffix of the content, and that of its compression, if any."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if compression == ".zst":
        import pyarrow as pa

        # A NativeFile is a raw stream in all but name.
        return io.BufferedReader(cast("io.RawIOBase", pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    return path.open("rb")


def _read_lines(path: Path, file: IO[bytes], example: str) -> Rows:
    end = 0
    for number, line in enumerate(file, start=1):
        start, end = end, end + len(line)
        content = line.removeprefix(BOM) if number == 1 else line
        if not content.strip():
            continue
        try:
            row = json.loads(content.decode())
        except UnicodeDecodeError as error:
            place = f"0x{content[error.start]:02x} at byte {start + error.start}, line {number}"
            raise DataError(not_text(path, place)) from None
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"data.paths: {path}:{number}: not JSON ({first_line(error)}); mend or remove the line"
            ) from None
        yield f"{path}:{number}", _object(row, f"{path}:{number}", example)


def _read_json(path: Path, file: IO[bytes], example: str) -> Rows:
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(not_text(path, f"0x{error.object[error.start]:02x} at byte {error.start}")) from None
    decode, lines = json.JSONDecoder().raw_decode, _Lines(path, text)
    number, place = 0, _blank(text, 0)
    in_array = text[place : place + 1] == "["
    place = _blank(text, place + 1) if in_array else place
    while place < len(text) and not (in_array and text[place] == "]"):
        number += 1
        where = f"{lines.at(place)}, record {number}"
        try:
            row, end = decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"data.paths: {where}: not JSON ({first_line(error)}); mend the file") from None
        yield where, _object(row, where, example)
        place = _blank(text, end)
        if in_array and text[place : place + 1] == ",":
            place = _blank(text, place + 1)
        elif in_array and text[place : place + 1] != "]":
            raise DataError(
                f"data.paths: {lines.at(place)}: not JSON (neither a comma nor the end of the array); mend the file"
            )
    if in_array and _blank(text, place + 1) < len(text):
        raise DataError(f"data.paths: {lines.at(place)}: not JSON (something follows the array); mend the file")
    if in_array and place >= len(text):
        raise DataError(f"data.paths: {lines.at(place)}: not JSON (the array has no end); mend the file")


@dataclass
class _Lines:
    """Numbers of lines, asked for from the beginning to the end."""

    path: Path
    text: str
    place: int = 0
    line: int = 1

    def at(self, place: int) -> str:
        self.line += self.text.count("\n", self.place, place)
        self.place = place
        return f"{self.path}:{self.line}"


def _blank(text: str, place: int) -> int:
    """The next character from here on that is not blank."""
    found = BLANK.match(text, place)
    return found.end() if found else place


def _read_csv(path: Path, file: IO[bytes], example: str) -> Rows:
    csv.field_size_limit(LONGEST_CELL)
    # A discarded wrapper closes its file, which does not belong to it.
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        yield from _read_cells(path, csv.reader(text, strict=True))
    finally:
        text.detach()


def _read_cells(path: Path, lines: Any) -> Rows:
    names: list[str] = []
    begin = 1
    while True:
        try:
            values: list[str] | None = next(lines, None)
        except UnicodeDecodeError as error:
            place = f"0x{error.object[error.start]:02x} behind line {begin}"
            raise DataError(not_text(path, place)) from None
        except csv.Error as error:
            raise DataError(f"data.paths: {path}:{begin}: not CSV ({first_line(error)}); mend the file") from None
        if values is None:
            return
        where, begin = f"{path}:{begin}", lines.line_num + 1
        if not values:
            continue
        if not names:
            names = values
            if len(set(names)) < len(names) or "" in names:
                raise DataError(f"data.paths: {where}: columns without a name of their own; name each once")
        elif len(values) != len(names):
            raise DataError(
                f"data.paths: {where}: {len(values)} value(s) for {len(names)} column(s); mend or remove the line"
            )
        else:
            yield where, dict(zip(names, values, strict=True))


def _read_parquet(path: Path, column: str | None) -> Rows:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            # An absent column is an absent field: the row's reader reports it.
            wanted = [name for name in (column, (column or "").split(".")[0]) if name in names][:1]
            columns = (wanted or names) if column is not None else None
            number = 0
            # Batches of a row group, not the group: one group may be larger than memory.
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row if column else sparse(row)
    except (DataError, OSError):
        raise
    # The library raises its own errors, and for some damage those of Python: of values, memory, characters.
    except Exception as error:
        raise DataError(
            f"data.paths: {path} is not a sound parquet file ({first_line(error)}); write it again"
        ) from None


def sparse(value: Any) -> Any:
    """Without null fields inside lists and objects: a table gives each of them the fields of all others, and a template
    would write arguments that a call never had."""
    if isinstance(value, list):
        return [sparse(each) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: sparse(each) for name, each in cast("Row", value).items() if each is not None}
    return value


def _object(row: object, where: str, example: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"data.paths: {where}: not a JSON object but {type(row).__name__}; write {example}")
    return cast("Row", row)


READERS: dict[str, Callable[[Path, IO[bytes], str], Rows]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
}
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (".jsonl", ".parquet", *(f".jsonl{end}" for end in COMPRESSIONS))
NAMED_ALONE = tuple(f"{kind}{end}" for kind in (".json", ".csv") for end in ("", *COMPRESSIONS))
"""Kinds that a folder may hold for other purposes, next to its data: they are read only if they are named."""
