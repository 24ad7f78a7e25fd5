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


def _answer(arguments: argparse.Namespace) -> int:
    # These imports take seconds, which `--help` and a misspelt argument need not wait for.
    command = {"export": _export, "merge": _merge, "import": _import, "verify": _verify}[arguments.command]
    for line in command(arguments):
        print(line)
    return delivered(EXIT_FINISHED)


def _parser() -> Parser:
    parser = Parser(prog="python -m trainer.checkpoint", description="Use the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    source = "folder of a run (its newest whole checkpoint is taken) or of one checkpoint"
    exporting = commands.add_parser("export", help="write a Hugging Face folder, without a GPU and in little memory")
    exporting.add_argument("source", type=Path, help=source)
    exporting.add_argument("target", type=Path, help="folder to make")
    exporting.add_argument(
        "--format",
        choices=("transformers", "deepspeed", "dcp"),
        default="transformers",
        help="with optimizer states and step: deepspeed, a universal checkpoint, or dcp, torch distributed checkpoints"
        " as accelerate writes them (%(default)s)",
    )
    exporting.add_argument("--max-shard-size", metavar="SIZE", help="of a file (5GB)")
    exporting.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the Hugging Face folder")
    exporting.add_argument("--private", action="store_true", help="make the hub's repository a private one")
    merging = commands.add_parser("merge", help="write a Hugging Face folder of an adapter merged into its base")
    merging.add_argument("source", type=Path, help=f"folder of an adapter, {source}")
    merging.add_argument("target", type=Path, help="folder to make")
    merging.add_argument("--base", help="folder or hub id of the model beneath (default: what the adapter names)")
    for writing in (exporting, merging):
        writing.add_argument("--dtype", choices=DTYPES, default="float32", help="of the exported tensors (%(default)s)")
    importing = commands.add_parser("import", help="make a checkpoint of this trainer from that of another one")
    importing.add_argument("source", type=Path, help="folder of the other trainer's checkpoint")
    importing.add_argument("target", type=Path, help="folder to make; then train.resume=TARGET")
    importing.add_argument("--model", help="folder or hub id of the model, where the source has no config.json")
    verifying = commands.add_parser("verify", help="compare every file with its size and SHA-256")
    verifying.add_argument("source", type=Path, help=source)
    return parser


def _export(arguments: argparse.Namespace) -> Iterator[str]:
    source, target = arguments.source.absolute(), arguments.target.absolute()
    _check_export(arguments)
    if arguments.format == "deepspeed":
        from trainer.checkpoint.universal import export_universal

        yield f"{arguments.target}: {export_universal(source, target)} as a universal checkpoint of DeepSpeed"
        return
    if arguments.format == "dcp":
        from trainer.checkpoint.distributed import export_distributed

        yield f"{arguments.target}: {export_distributed(source, target)} as torch distributed checkpoints"
        return
    import torch
    from accelerate.utils import convert_file_size_to_int

    from trainer.checkpoint.export import export
    from trainer.checkpoint.push import check_push, push

    try:
        shard_bytes = int(convert_file_size_to_int(arguments.max_shard_size or "5GB"))
    except ValueError:
        raise ConfigError(
            f"--max-shard-size {arguments.max_shard_size}: is no size; give one like 5GB or 500MiB"
        ) from None
    if arguments.push_to_hub is not None:
        check_push(arguments.push_to_hub)
    folder = export(source, target, dtype=getattr(torch, arguments.dtype), shard_bytes=shard_bytes)
    yield f"{arguments.target}: the model of {folder} in {arguments.dtype}"
    if arguments.push_to_hub is not None:
        yield f"pushed to {push(target, arguments.push_to_hub, private=arguments.private)}"


def _check_export(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a flag without effect."""
    problems = []
    if arguments.format != "transformers":
        flags = {"--push-to-hub": arguments.push_to_hub, "--max-shard-size": arguments.max_shard_size}
        flags["--dtype"] = arguments.dtype if arguments.dtype != "float32" else None
        problems = [
            f"{flag} {value}: is for --format transformers; leave it out" for flag, value in flags.items() if value
        ]
    if arguments.private and arguments.push_to_hub is None:
        problems.append("--private: is for --push-to-hub OWNER/NAME; give both, or leave it out")
    if problems:
        raise ConfigError(*problems)


def _merge(arguments: argparse.Namespace) -> Iterator[str]:
    import torch

    from trainer.checkpoint.merge import merge

    dtype = getattr(torch, arguments.dtype)
    said = merge(arguments.source.absolute(), arguments.target.absolute(), dtype=dtype, base=arguments.base)
    yield f"{arguments.target}: {said}, in {arguments.dtype}"


def _import(arguments: argparse.Namespace) -> Iterator[str]:
    from trainer.checkpoint.foreign.importing import import_checkpoint

    yield from import_checkpoint(arguments.source.absolute(), arguments.target.absolute(), model=arguments.model)


def _verify(arguments: argparse.Namespace) -> Iterator[str]:
    from trainer.checkpoint.export import newest_whole

    folder, manifest = newest_whole(arguments.source.absolute(), newest=True)
    yield f"{folder}: step {manifest.step}, {len(manifest.files)} files, {manifest.bytes:,} bytes, all as written"


if __name__ == "__main__":
    sys.exit(main())
