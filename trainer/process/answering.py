"""How an entry point ends: with its exit code, or one line for each problem that a user can fix."""

from __future__ import annotations

from collections.abc import Callable

from configs.entry_point import print_problems
from configs.errors import CookbookError
from configs.output import guard_output
from trainer.process.disks import disk_problem


def answered(work: Callable[[], int]) -> int:
    """Returns the exit code. Re-raises errors that are neither a CookbookError nor a disk's refusal."""
    guard_output()
    try:
        return work()
    except CookbookError as error:
        return print_problems(error)
    except OSError as error:
        if (problem := disk_problem(error)) is None:
            raise
        return print_problems(problem)
