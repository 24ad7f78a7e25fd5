"""Which files a configuration names, and whether they can be read at all."""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from configs.errors import DataError, first_line
from trainer.data import rows

TEXT = (".txt", ".md")
ROW_SUFFIXES = (*rows.SUFFIXES, *rows.NAMED_ALONE)
SUFFIXES = (*TEXT, *ROW_SUFFIXES)


def find_files(entries: Iterable[str], *, key: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that paths, folders (searched recursively) and glob patterns name, each once.

    Folders and patterns skip other suffixes and hidden files, folders also .json and .csv if they hold other data; a
    file that is named itself must be supported. Raises DataError with every entry that matches nothing. key: the
    entries' key in the configuration.
    """
    found: dict[Path, None] = {}
    problems = []
    for entry in entries:
        path = Path(os.path.expanduser(entry))
        try:
            matches = _matches(path, suffixes)
            usable = [match for match in matches if _ends(match, suffixes) or match == path]
            unreadable = [f"{key}={entry}: {why}" for match in usable if (why := why_not_readable(match))]
        # A string that no path can be (a NUL in it) is a ValueError.
        except (OSError, ValueError) as error:
            problems.append(f"{key}={entry}: cannot be looked up ({_why(error, path)}); name another")
            continue
        usable = [match for match in usable if _ends(match, suffixes)]
        if not usable and not unreadable:
            problems.append(f"{key}={entry}: {_why_nothing(path, matches, suffixes)}")
        problems += unreadable
        found.update(dict.fromkeys(match.resolve() for match in usable))
    if problems:
        raise DataError(*problems)
    return list(found)


def _matches(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, the files in the folder, or those that the pattern matches, in folders it matches too."""
    if path.is_dir():
        return _in_folder(path, suffixes)
    if os.path.lexists(path):
        return [path]
    matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
    return [file for match in matches for file in (_in_folder(match, suffixes) if match.is_dir() else [match])]


def _in_folder(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder, without those that may be metadata: a dataset_info.json next to data."""
    found = files_inside(folder)
    data = [path for path in found if _ends(path, suffixes) and not _ends(path, rows.NAMED_ALONE)]
    return [path for path in found if not _ends(path, rows.NAMED_ALONE)] if data else found


def _ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(suffixes))


def files_inside(folder: Path) -> list[Path]:
    """All non-folders, including those in linked folders. Raises OSError for an unreadable folder."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen = set[str]()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # A link may lead back to its own folder.
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def why_not_readable(path: Path) -> str | None:
    """The problem of a file that is to be read, if any. Reading a pipe or a device would wait."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"{path} is a link to nothing; mend or remove it" if path.is_symlink() else f"{path} is gone"
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        return f"{path} is {kinds.get(stat.S_IFMT(mode), 'no file')}, which cannot be read twice; write a file"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read (Permission denied); change its permissions, or leave it out"
    return None


def _why(error: Exception, path: Path) -> str:
    """The problem, and the file below `path` that has it."""
    if not isinstance(error, OSError):
        return first_line(error)
    below = [str(error.filename)] if error.filename not in (None, str(path)) else []
    return ": ".join([error.strerror or first_line(error), *below])


def _why_nothing(path: Path, matches: list[Path], suffixes: Sequence[str]) -> str:
    supported = f"supported are {', '.join(s for s in suffixes if not s.endswith(rows.COMPRESSIONS))}"
    supported += f" ({' or '.join(rows.COMPRESSIONS)} may follow those of rows)"
    if path.is_file():
        return f"is a {path.suffix or 'file without suffix'}; {supported}"
    if matches:
        found = Counter(match.suffix or "no suffix" for match in matches)
        return f"holds only {', '.join(f'{n} x {suffix}' for suffix, n in found.most_common(5))}; {supported}"
    if path.is_dir():
        return f"the folder holds no files; {supported}"
    return f"no such file or folder, and no pattern that matches one (relative to {Path.cwd()}); {supported}"
