"""The entry point for checkpoints.

python -m trainer.checkpoint export RUN_DIR_OR_CHECKPOINT OUT     a Hugging Face folder; needs no GPU
python -m trainer.checkpoint export RUN_DIR OUT --format dcp      torch distributed checkpoints, with optimizer states
python -m trainer.checkpoint export RUN_DIR OUT --format deepspeed   a universal checkpoint of DeepSpeed
python -m trainer.checkpoint merge RUN_DIR_OR_ADAPTER OUT         the same, of an adapter merged into its base
python -m trainer.checkpoint import SOURCE OUT                    a checkpoint of another trainer, for train.resume
python -m trainer.checkpoint verify RUN_DIR_OR_CHECKPOINT         read every byte and compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.entry_point import Parser
from configs.errors import EXIT_FINISHED, ConfigError
from configs.output import delivered
from trainer.process.answering import answered

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0; 1 for a damaged checkpoint (of a run: its newest one); 2 for a mistake
    in the arguments, or a folder that cannot be read or written."""
    return answered(lambda: _answer(_parser().parse_args(argv)))


def _answer(words: argparse.Namespace) -> int:
    # These imports take seconds, which `--help` and a misspelt argument need not wait for.
    for line in {"export": _export, "merge": _merge, "import": _import, "verify": _verify}[words.command](words):
        print(line)
    return delivered(EXIT_FINISHED)


def _parser() -> Parser:
    parser = Parser(prog="python -m trainer.checkpoint", description="Use the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    source = "folder of a run (its newest whole checkpoint is taken) or of one checkpoint"
    export_words = commands.add_parser("export", help="write a Hugging Face folder, without a GPU and in little memory")
    export_words.add_argument("source", type=Path, help=source)
    export_words.add_argument("target", type=Path, help="folder to make")
    export_words.add_argument(
        "--format",
        choices=("transformers", "deepspeed", "dcp"),
        default="transformers",
        help="with optimizer states and step: deepspeed, a universal checkpoint, or dcp, torch distributed checkpoints"
        " as accelerate writes them (%(default)s)",
    )
    export_words.add_argument("--max-shard-size", metavar="SIZE", help="of a file (5GB)")
    export_words.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the Hugging Face folder")
    export_words.add_argument("--private", action="store_true", help="make the hub's repository a private one")
    merge_words = commands.add_parser("merge", help="write a Hugging Face folder of an adapter merged into its base")
    merge_words.add_argument("source", type=Path, help=f"folder of an adapter, {source}")
    merge_words.add_argument("target", type=Path, help="folder to make")
    merge_words.add_argument("--base", help="folder or hub id of the model beneath (default: what the adapter names)")
    for words in (export_words, merge_words):
        words.add_argument("--dtype", choices=DTYPES, default="float32", help="of the exported tensors (%(default)s)")
    import_words = commands.add_parser("import", help="make a checkpoint of this trainer from that of another one")
    import_words.add_argument("source", type=Path, help="folder of the other trainer's checkpoint")
    import_words.add_argument("target", type=Path, help="folder to make; then train.resume=TARGET")
    import_words.add_argument("--model", help="folder or hub id of the model, where the source has no config.json")
    verify_words = commands.add_parser("verify", help="compare every file with its size and SHA-256")
    verify_words.add_argument("source", type=Path, help=source)
    return parser


def _export(words: argparse.Namespace) -> Iterator[str]:
    source, target = words.source.absolute(), words.target.absolute()
    _check_export(words)
    if words.format == "deepspeed":
        from trainer.checkpoint.universal import export_universal

        yield f"{words.target}: {export_universal(source, target)} as a universal checkpoint of DeepSpeed"
        return
    if words.format == "dcp":
        from trainer.checkpoint.distributed import export_distributed

        yield f"{words.target}: {export_distributed(source, target)} as torch distributed checkpoints"
        return
    import torch
    from accelerate.utils import convert_file_size_to_int

    from trainer.checkpoint.export import export
    from trainer.checkpoint.push import check_push, push

    try:
        shard_bytes = int(convert_file_size_to_int(words.max_shard_size or "5GB"))
    except ValueError:
        raise ConfigError(f"--max-shard-size {words.max_shard_size}: is no size; give one like 5GB or 500MiB") from None
    if words.push_to_hub is not None:
        check_push(words.push_to_hub)
    folder = export(source, target, dtype=getattr(torch, words.dtype), shard_bytes=shard_bytes)
    yield f"{words.target}: the model of {folder} in {words.dtype}"
    if words.push_to_hub is not None:
        yield f"pushed to {push(target, words.push_to_hub, private=words.private)}"


def _check_export(words: argparse.Namespace) -> None:
    """Raises ConfigError for a flag without effect."""
    problems = []
    if words.format != "transformers":
        flags = {"--push-to-hub": words.push_to_hub, "--max-shard-size": words.max_shard_size}
        flags["--dtype"] = words.dtype if words.dtype != "float32" else None
        problems = [
            f"{flag} {value}: is for --format transformers; leave it out" for flag, value in flags.items() if value
        ]
    if words.private and words.push_to_hub is None:
        problems.append("--private: is for --push-to-hub OWNER/NAME; give both, or leave it out")
    if problems:
        raise ConfigError(*problems)


def _merge(words: argparse.Namespace) -> Iterator[str]:
    import torch

    from trainer.checkpoint.merge import merge

    dtype = getattr(torch, words.dtype)
    said = merge(words.source.absolute(), words.target.absolute(), dtype=dtype, base=words.base)
    yield f"{words.target}: {said}, in {words.dtype}"


def _import(words: argparse.Namespace) -> Iterator[str]:
    from trainer.checkpoint.foreign.importing import import_checkpoint

    yield from import_checkpoint(words.source.absolute(), words.target.absolute(), model=words.model)


def _verify(words: argparse.Namespace) -> Iterator[str]:
    from trainer.checkpoint.export import newest_whole

    folder, manifest = newest_whole(words.source.absolute(), newest=True)
    yield f"{folder}: step {manifest.step}, {len(manifest.files)} files, {manifest.bytes:,} bytes, all as written"


if __name__ == "__main__":
    sys.exit(main())
