"""Measured parts of a page: the text between `<!-- measured: COMMAND -->` and `<!-- end of measured -->`."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path


def write(page: Path, command: str, text: str) -> None:
    """Write the measurements of a command between its markers. Raises SystemExit if the page has no such markers."""
    begin, end = f"<!-- measured: {command} -->", "<!-- end of measured -->"
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    after, found = pattern.subn(lambda match: f"{match[1]}{text}{match[2]}", page.read_text())
    if not found:
        raise SystemExit(f"{page}: has no line {begin}")
    page.write_text(after)


def conditions(*packages: str) -> str:
    """The beginning of a sentence that gives the date, the versions and the machine of a measurement."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"Measured {datetime.datetime.now(datetime.UTC):%Y-%m-%d} with {versions}, Python {platform.python_version()},"
        f" on {os.cpu_count()} cores ({platform.machine()})"
    )
