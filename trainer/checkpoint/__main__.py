"""The door to checkpoints.

python -m trainer.checkpoint export RUN_DIR_OR_CHECKPOINT OUT     a Hugging Face folder; needs no GPU
python -m trainer.checkpoint merge RUN_DIR_OR_ADAPTER OUT         the same, of an adapter merged into its base
python -m trainer.checkpoint verify RUN_DIR_OR_CHECKPOINT         read every byte and compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.door import turn_away
from configs.errors import EXIT_FINISHED, CookbookError
from configs.output import delivered, guard_output
from trainer.process.disks import told_anywhere

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say. Returns the exit code: 0, 1 for a damaged checkpoint (of a run: its newest one), 2 for a
    mistake in the words, or a folder that cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m trainer.checkpoint", description="Use the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    source = "folder of a run (its newest whole checkpoint is taken) or of one checkpoint"
    export_words = commands.add_parser("export", help="write a Hugging Face folder, without a GPU and in little memory")
    export_words.add_argument("source", type=Path, help=source)
    export_words.add_argument("target", type=Path, help="folder to make")
    merge_words = commands.add_parser("merge", help="write a Hugging Face folder of an adapter merged into its base")
    merge_words.add_argument("source", type=Path, help=f"folder of an adapter, {source}")
    merge_words.add_argument("target", type=Path, help="folder to make")
    merge_words.add_argument("--base", help="folder or hub id of the model beneath (default: what the adapter names)")
    for words in (export_words, merge_words):
        words.add_argument("--dtype", choices=DTYPES, default="float32", help="of the exported tensors (%(default)s)")
    verify_words = commands.add_parser("verify", help="compare every file with its size and SHA-256")
    verify_words.add_argument("source", type=Path, help=source)
    guard_output()
    words = parser.parse_args(argv)

    # Seconds of imports, which `--help` and a misspelt word need not wait for.
    import torch

    from trainer.checkpoint.export import export, newest_whole

    try:
        if words.command == "export":
            folder = export(words.source.absolute(), words.target.absolute(), dtype=getattr(torch, words.dtype))
            print(f"{words.target}: the model of {folder} in {words.dtype}")
        elif words.command == "merge":
            from trainer.checkpoint.merge import merge

            source, target = words.source.absolute(), words.target.absolute()
            said = merge(source, target, dtype=getattr(torch, words.dtype), base=words.base)
            print(f"{words.target}: {said}, in {words.dtype}")
        else:
            folder, manifest = newest_whole(words.source.absolute(), newest=True)
            print(
                f"{folder}: step {manifest.step}, {len(manifest.files)} files, {manifest.bytes:,} bytes, all as written"
            )
    except CookbookError as error:
        return turn_away(error)
    except OSError as error:
        if (told := told_anywhere(error)) is None:
            raise
        return turn_away(told)
    return delivered(EXIT_FINISHED)


if __name__ == "__main__":
    sys.exit(main())
