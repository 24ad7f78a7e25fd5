"""`cookbook import`: the configuration of another trainer becomes an experiment of this one.

    cookbook import ds_config.json args.json model.path=FOLDER cluster=8xh100
    cookbook import llama3_8b.toml model=llama3_1_8b --to mine/experiment/llama.yaml

FILE: from DeepSpeed, accelerate, TrainingArguments (also training_args.bin, which is not executed), torchtitan, axolotl
or LLaMA-Factory; several files are read as one run. Every field is listed under its fate.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.entry_point import Parser
from configs.errors import EXIT_FINISHED, ConfigError, CookbookError, PlanError
from configs.imports.combine import Imported, has_model
from configs.imports.write import as_config, experiment, report
from configs.load import group_options
from configs.output import delivered
from launch.translated import translate
from trainer.estimate.gate import EXIT_DOES_NOT_FIT, judged
from trainer.process.answering import answered

OWN = Path("mine")
"""The folder of a user's own options, as in docs/slurm.md: `--config-dir mine`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Translate, write, judge. Returns the exit code: 0; 2 if a file cannot be read or the configuration cannot run;
    3 if it does not fit the GPUs."""
    return answered(lambda: delivered(_import(_parser().parse_intermixed_args(argv))))


def _parser() -> Parser:
    parser = Parser(
        prog="cookbook import", description="Translate the configuration of another trainer into an experiment file."
    )
    parser.add_argument(
        "given", nargs="+", metavar="FILE|OVERRIDE", help="files to translate; key=value wins over them"
    )
    parser.add_argument("--to", type=Path, help="the file to write (mine/experiment/FIRST_FILE.yaml)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("-cd", "--config-dir", help="a folder of your own options, which overrides may name")
    return parser


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and overrides. An argument with = is an override, unless a file has this name."""
    files = [word for word in arguments if "=" not in word or os.path.isfile(word)]
    return files, [word for word in arguments if word not in files]


def _import(arguments: argparse.Namespace) -> int:
    files, overrides = split_arguments(arguments.given)
    if not files:
        raise ConfigError("cookbook import: no file is named; give at least one, see cookbook import --help")
    target = arguments.to or OWN / "experiment" / f"{_label(files[0])}.yaml"
    _check_target(target, force=arguments.force)
    made = translate(files, overrides, config_dir=arguments.config_dir)
    start = ["python", "-m", "launch", f"--config-dir={target.parent.parent}", f"experiment={target.stem}"]
    command = shlex.join(start) + ("" if has_model(made) else " model.path=FOLDER")
    print(report(made), end="\n\n")
    for line in made.assumed:
        print(f"assumed    {line}")
    code, verdict = _judge(made)
    print(verdict, flush=True)
    # After the verdict: a refused import leaves no file that would block the next try.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(experiment(made, command), encoding="utf-8")
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(f"--to={target}: cannot be written ({error.strerror})") from None
    if has_model(made):  # torch has been imported by now
        from launch.their_libraries import checked

        for line in checked(made):
            print(line)
    print(f"written    {target}")
    print(f"run it     {command}")
    return code


def _label(file: str) -> str:
    name = re.sub(r"\W+", "_", Path(file).stem, flags=re.ASCII).strip("_") or "imported"
    return f"{name}_imported" if name in group_options()["experiment"] else name


def _check_target(target: Path, *, force: bool) -> None:
    problems: list[str] = []
    if target.suffix != ".yaml" or target.parent.name != "experiment":
        problems.append(f"--to={target}: must be FOLDER/experiment/NAME.yaml, which --config-dir=FOLDER then finds")
    elif target.stem in group_options()["experiment"]:
        problems.append(f"--to={target}: experiment={target.stem} is an option of this package; give another name")
    if target.exists() and not force:
        problems.append(f"{target}: exists; --to=FOLDER/experiment/NAME.yaml writes another, --force replaces it")
    if problems:
        raise ConfigError(*problems)


def _judge(made: Imported) -> tuple[int, str]:
    """The exit code, and a line about memory. Raises CookbookError if the configuration cannot run at all."""
    if not has_model(made):
        return EXIT_FINISHED, "memory     not estimated: no file names a model; give model.path=FOLDER or model=OPTION"
    # These imports take seconds, which --help and an unreadable file need not wait for.
    from launch.answers import answer

    try:
        found = answer([], config=as_config(made), compare=True).estimate
    except (ConfigError, PlanError):
        raise
    except CookbookError as error:
        return EXIT_FINISHED, f"memory     not estimated: {error.problems[0]}"
    return EXIT_DOES_NOT_FIT if found.too_large else EXIT_FINISHED, judged(found, found.device.capacity_bytes)


if __name__ == "__main__":
    sys.exit(main())
