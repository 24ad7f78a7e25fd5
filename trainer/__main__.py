"""The entry point inside the job: every rank starts here, whichever launcher started it.

    python -m trainer OVERRIDES                              one process, a debugger works
    torchrun --rdzv-backend=loopback --nproc-per-node 8 -m trainer OVERRIDES
    deepspeed --num_gpus 8 --module trainer OVERRIDES
    accelerate launch --num_processes 8 --rdzv_backend=loopback -m trainer OVERRIDES

Config and plan come first and need no torch, so that a mistake is reported before the libraries are loaded. Every
rank composes the same configuration from the same overrides. Next: `loop`.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from configs import waiting
from configs.entry_point import Arguments, EntryPoint, parse_arguments, print_problems, show
from configs.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    ConfigError,
    CookbookError,
    OutOfMemory,
    PlanError,
    RankProblem,
    RankStuck,
)
from configs.interpolation import settle_clock
from configs.load import load_config
from configs.output import announce, delivered, guard_output
from configs.schema import Config
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.disks import disk_problem
from trainer.process.exhausted import start_problem
from trainer.process.lifeline import watch
from trainer.process.segments import set_segments
from trainer.process.stopping import QUIET_STOP
from trainer.process.world import PLAN_SHOWN, accelerate_note, check_world, speaks_for_node

if TYPE_CHECKING:
    from trainer.report.callbacks import Callback

EXIT_INTERRUPTED = 130
ENTRY_POINT = EntryPoint(
    program="python -m trainer",
    purpose="Train a causal language model: one process, or one rank of a launcher's.",
    examples=(
        ("python -m trainer experiment=demo parallel=single", "one process, a debugger works"),
        ("torchrun --rdzv-backend=loopback --nproc-per-node 2 -m trainer experiment=demo", "two, under any launcher"),
        ("python -m trainer parallel=zero3 dry_run=true", "print the plan, train nothing"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the overrides say. Returns the exit code. A user's mistake is reported once per node, in plain lines."""
    guard_output()
    try:
        arguments = parse_arguments(ENTRY_POINT, sys.argv[1:] if argv is None else argv)
        if arguments.show is not None:
            print(show(ENTRY_POINT, arguments))
            return delivered(EXIT_FINISHED)
        code = train(arguments)
        return EXIT_FINISHED if code == EXIT_STOPPED and os.environ.get(QUIET_STOP) else code
    except CookbookError as error:
        # All ranks of a node see the same mistakes. A few only one rank sees, and a stuck rank cannot report.
        if speaks_for_node() or isinstance(error, (OutOfMemory, RankProblem, RankStuck)):
            print_problems(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        rank = int(os.environ.get("RANK", "0"))
        if (problem := start_problem(error, rank) or disk_problem(error, f"rank {rank}: ")) is not None:
            print_problems(problem)
            return problem.exit_code
        print(_with_rank(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        return EXIT_FAILED


def train(arguments: Arguments) -> int:
    """Compose, then start. Raises CookbookError for mistakes that the user can fix."""
    return start(load_config(_settled(arguments.overrides), config_dir=arguments.config_dir))


def start(config: Config, callbacks: Sequence[Callback] = ()) -> int:
    """Plan, and run the loop on this rank. callbacks: see `trainer.report.callbacks`. Raises CookbookError."""
    check_world()
    plan = make_plan(config, find_machine())
    if config.dry_run:
        print(plan.describe())
        return delivered(EXIT_FINISHED)
    if plan.world_size > 1 and "RANK" not in os.environ:
        raise PlanError(
            f"parallel={config.parallel.preset}: the plan has {plan.world_size} processes, python -m trainer is one;"
            " start it with python -m launch, or set cluster.gpus_per_node=1"
        )
    watch()
    if plan.device == "cuda":
        set_segments(config.cluster.expandable_segments, os.environ)
    if config.profile:
        # Otherwise Kineto, which reads it when torch is loaded, writes a line whenever it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if os.environ.get("RANK", "0") == "0" and PLAN_SHOWN not in os.environ:
        print(plan.describe(), flush=True)
    with progress_shown():
        if (note := accelerate_note()) is not None:
            logging.getLogger("trainer").info(note)
        announce("importing torch and transformers")
        from trainer.model.importing import import_transformers

        import_transformers()
        from trainer.run.loop import run

        return run(config, plan, callbacks)


def _settled(overrides: Sequence[str]) -> list[str]:
    """The overrides with the time filled in. Raises ConfigError if each of several ranks would read its own clock."""
    settled = settle_clock(overrides, datetime.now())
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and (timed := [word for word, other in zip(overrides, settled, strict=True) if word != other]):
        rule = "each rank would read its own clock; start with python -m launch, which reads it once"
        raise ConfigError(*(f"{word}: {rule}" for word in timed))
    return settled


@contextmanager
def progress_shown() -> Generator[None]:
    """Show messages of the passes and the data during preparation: all of rank 0's, and every rank's warnings."""
    log = logging.getLogger("trainer")
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    handler = None
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    try:
        yield
    finally:
        waiting.clear()
        if handler is not None:
            log.removeHandler(handler)


def _with_rank(text: str) -> str:
    """Prefix each line with the rank, in torch's own form: several ranks write to one terminal."""
    rank = os.environ.get("RANK", "0")
    return "".join(f"[rank{rank}]: {line}" for line in text.splitlines(keepends=True))


if __name__ == "__main__":
    ended_with = main()
    # Before it ends, the interpreter would search everything that torch has loaded for cycles: seconds of waiting.
    gc.freeze()
    sys.exit(ended_with)
