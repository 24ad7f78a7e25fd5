"""One line on a terminal's stderr while an estimate takes longer than a second; nothing anywhere else."""

from __future__ import annotations

import sys
import time

PATIENCE = 1.0
_begun = time.monotonic()
_shown = False


def show(text: str, *, at_once: bool = False) -> None:
    """at_once: this is known to take longer."""
    global _shown
    if (at_once or time.monotonic() - _begun > PATIENCE) and sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        _shown = True


def clear() -> None:
    """Before the answer or a problem is printed."""
    global _shown
    if _shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        _shown = False
