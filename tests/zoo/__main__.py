"""Trains a tiny model of every causal language model type of transformers under every layout.

    python -m tests.zoo                        all; results that exist for these versions are not run again
    python -m tests.zoo llama mixtral          some types
    python -m tests.zoo --layouts fsdp tensor  some layouts
    python -m tests.zoo --again crash differs  rerun the cases with these verdicts
    python -m tests.zoo --write                write docs/models.md from the results so far

Each case trains three steps and is compared with one process, in about a second. It can be interrupted at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import transformers

from tests.zoo.judge import LAYOUTS, Verdict, visit
from tests.zoo.table import PAGE, render, versions
from tests.zoo.tiny import types

BUILD = Path(__file__).parents[2] / "build" / "zoo"
Seen = dict[str, dict[str, Verdict]]


def run(file: Path, chosen: Sequence[str], layouts: Sequence[str], again: Sequence[str]) -> None:
    for model_type in chosen:
        # Read the file each time, since another run may have saved results.
        known, began = read(file).get(model_type, {}), time.monotonic()
        once_more = [name for name in layouts if {known.get(name, {}).get("verdict"), "all"} & {*again}]
        known = {name: verdict for name, verdict in known.items() if name not in once_more}
        done = [*visit(model_type, layouts, known)]
        if not done:
            continue
        save(file, {**read(file), model_type: known})
        print(f"{model_type} ({time.monotonic() - began:.0f} s): {_counted([known[n] for n in done])}", flush=True)
        for name in done:
            if known[name]["verdict"] not in ("ok", "refused"):
                print(f"    {name}: {known[name]['verdict']}: {known[name].get('note')}", flush=True)


def read(file: Path) -> Seen:
    return json.loads(file.read_text()) if file.exists() else {}


def save(file: Path, seen: Seen) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(seen, indent=1))
    partial.rename(file)


def _counted(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(str(verdict["verdict"]) for verdict in verdicts)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="some types; all without")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--again", nargs="*", default=[], help="verdicts that are found out once more; `all` for any")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}, and run nothing")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    file = BUILD / f"{versions().replace(', ', '-').replace(' ', '')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if arguments.write:
        PAGE.write_text(render(read(file)))
    else:
        run(file, arguments.types or types(), arguments.layouts, arguments.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
