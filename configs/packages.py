"""The version of an installed package, without importing it."""

from __future__ import annotations

from importlib import metadata


def installed(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
