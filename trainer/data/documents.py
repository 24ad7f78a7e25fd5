"""Files in, documents out: the text of a configuration's files (`paths` finds the files).

    .txt .md                        one document per file
    .jsonl .json .csv .parquet      one document per row, in the field `data.text_key` (`rows`)

A document comes in pieces. A text file of any size is read in pieces of about 16 KiB that end at a line's end: memory
stays small, and a single big file can still be split into training and validation text. Empty files, and rows whose
text is empty or null, are skipped and counted; a folder of scraped text often has some. Any other text that is not
clean stops the run, with the place.
"""

from __future__ import annotations

import codecs
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import DataError, first_line
from trainer.data.rows import ABSENT, is_rows, names_of, not_text, read_rows, value_of

PIECE_BYTES = 16 * 2**10
BUILTIN_BYTES = 8 * 2**20
# Of the standard library: tables and test cases, which are not prose or program, and files that do not belong to it.
NOT_BUILTIN = {
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


class Piece(NamedTuple):
    """last: the document ends with this piece."""

    text: str
    last: bool


def content_hash(text: str) -> int:
    """A 64-bit hash of the text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def both_sides(threshold: int, lowest: int, highest: int) -> int:
    """Text whose hash is below `threshold` is held out. Of two different pieces one is, and the other is not."""
    return min(max(threshold, lowest + 1), highest)


def builtin_files() -> list[Path]:
    """The running Python's own library as source files, in the order of their names, up to 8 MiB."""
    root = Path(sysconfig.get_path("stdlib"))
    chosen, total = [], 0
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if NOT_BUILTIN & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        total += path.stat().st_size
        if total > BUILTIN_BYTES:
            break
        chosen.append(path)
    if not chosen:
        raise DataError(f"data.source=builtin: this Python keeps no source text in {root}; use data=files")
    return chosen


def read_pieces(path: Path, *, text_key: str) -> Iterator[Piece]:
    """The text of one file. Raises DataError with file and line, row or byte if it is malformed."""
    try:
        if is_rows(path):
            yield from _read_rows(path, text_key)
        else:
            yield from _read_text(path)
    except OSError as error:
        raise DataError(f"data.paths: {path} cannot be read ({error.strerror or first_line(error)})") from None


def _read_text(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        block, offset = _read_block(file), 0
        if not block:
            yield Piece("", last=True)
        while block:
            following = _read_block(file)
            undecoded = len(decoder.getstate()[0])
            if (zero := block.find(b"\0")) >= 0:
                raise DataError(not_text(path, f"NUL at byte {offset + zero}"))
            try:
                text = decoder.decode(block, final=not following)
            except UnicodeDecodeError as error:
                bad = error.object[error.start]
                raise DataError(not_text(path, f"0x{bad:02x} at byte {offset - undecoded + error.start}")) from None
            yield Piece(text, not following)
            offset, block = offset + len(block), following


def _read_block(file: Any) -> bytes:
    """Up to the end of the line that contains PIECE_BYTES, or twice as many bytes of a line without end."""
    return file.read(PIECE_BYTES) + file.readline(PIECE_BYTES)


def _read_rows(path: Path, text_key: str) -> Iterator[Piece]:
    for where, row in read_rows(path, example=f'{{"{text_key}": ...}}', column=text_key):
        yield Piece(text_of(row, text_key, where=where), last=True)


def text_of(row: dict[str, Any], text_key: str, *, where: str) -> str:
    """The text of a row; "" for null. Raises DataError if the field is absent or is not text."""
    text = value_of(row, text_key)
    if text is ABSENT:
        raise DataError(f"data.text_key={text_key}: {where} has no such field; it has {names_of(row)}")
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"data.text_key={text_key}: {where} holds {type(text).__name__} there, not text; name another field"
        )
    check_characters(text, what=f"data.text_key={text_key}: {where}")
    return text


def check_characters(text: str, *, what: str) -> None:
    """Raise DataError for text that JSON can spell and UTF-8 cannot. what: its place."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half a character (\\u{ord(text[error.start]):04x}), which no UTF-8 text can; mend or remove"
            " the line"
        ) from None
