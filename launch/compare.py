"""`python -m launch compare`: the same model on the same data under several layouts, and one page about them.

    python -m launch compare parallel=single,ddp,fsdp model=tiny train.steps=20 train.run_dir=runs/compared
    python -m launch compare runs/compared

The first form runs each point as `python -m launch` would, one after another, in a folder of its own under
train.run_dir, and then writes the page; finished points are not run again. The second form writes the page from
existing folders, for example those of a sweep on a cluster. Points that are refused or fail are listed with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from configs.entry_point import Arguments, EntryPoint, parse_arguments, print_problems, show
from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED, ConfigError, CookbookError
from launch.comparison.figures import check_matplotlib
from launch.comparison.page import write_page
from launch.comparison.runs import find_reference
from launch.comparison.table import TITLES, aligned, problems, table
from launch.points import Point, check_folder, plan_points
from trainer.process.disks import writing
from trainer.process.files import replace_text
from trainer.process.status import FINISHED, read_status
from trainer.report.reading import Run, read_run

RECORD = "compare.json"
ENTRY_POINT = EntryPoint(
    program="python -m launch compare",
    purpose="Train the same model on the same data under several layouts, and write one page that compares them.",
    examples=(
        ("python -m launch compare parallel=single,ddp,fsdp train.steps=20", "run three, write the page"),
        ("python -m launch compare runs/compared", "write the page from the runs in a folder"),
    ),
)
Launch = Callable[..., tuple[int, bool]]
"""`launch.__main__.launch`."""


def compare(argv: Sequence[str], *, launch: Launch) -> int:
    """Run the command `compare`. Returns 0, or the exit code of the first unfinished run.

    Raises CookbookError before anything is started.
    """
    arguments = parse_arguments(ENTRY_POINT, argv)
    if arguments.show is not None:
        print(show(ENTRY_POINT, arguments))
        return EXIT_FINISHED
    check_matplotlib()
    if len(arguments.overrides) == 1 and "=" not in arguments.overrides[0]:
        return _report(Path(arguments.overrides[0]).expanduser())
    return _compare(arguments, launch)


def _compare(arguments: Arguments, launch: Launch) -> int:
    folder, points = plan_points(arguments.overrides, config_dir=arguments.config_dir)
    for point in points:
        check_folder(point, folder / point.name)
    first = next(point.config for point in points if point.config is not None)
    if first.dry_run:
        for point in points:
            print(f"{point.name}: {shlex.join(point.overrides)}", point.plan.describe() if point.plan else point.reason)
        return EXIT_FINISHED
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    codes: list[int] = []
    for number, point in enumerate(points):
        _record(folder, points)
        code, stopped, reason = _run(point, folder, f"{number + 1} of {len(points)}", launch, arguments.config_dir)
        codes.append(code)
        points[number] = replace(point, reason=reason)
        if stopped:
            points[number + 1 :] = [replace(later, reason="not begun") for later in points[number + 1 :]]
            codes.append(EXIT_FAILED)
            break
    _record(folder, points)
    print()
    reported = _report(folder)
    return next((code for code in codes if code != EXIT_FINISHED), reported)


def _run(
    point: Point, folder: Path, which: str, launch: Launch, config_dir: str | None
) -> tuple[int, bool, str | None]:
    """Exit code, whether a signal requested the end, and why the run did not finish."""
    print(f"\n== {point.name} ({which}): {shlex.join(point.overrides)}", flush=True)
    if point.plan is None:
        print(point.reason)
        return EXIT_BAD_CONFIG, False, point.reason
    if read_status(folder / point.name).get("state") == FINISHED:
        print("finished already")
        return EXIT_FINISHED, False, None
    try:
        code, stopped = launch(point.overrides, config_dir=config_dir, stay=True)
    except CookbookError as error:
        return print_problems(error), False, error.problems[0]
    return code, stopped, None if code == EXIT_FINISHED else f"ended with exit code {code}"


def _record(folder: Path, points: Sequence[Point]) -> None:
    content = [{"name": point.name, "words": point.overrides, "reason": point.reason} for point in points]
    with writing(folder):
        replace_text(folder / RECORD, json.dumps(content, indent=1) + "\n")


def _report(folder: Path) -> int:
    """Write the page of the runs in a folder. Returns 0 if all are finished. Raises CookbookError."""
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(
            f"{folder}: no run folder in it; give one that holds run folders, or runs to make: parallel=ddp,fsdp"
        )
    files = write_page(folder, runs, command=f"python -m launch compare {shlex.quote(str(folder))}")
    reference = find_reference(runs)
    print(aligned([TITLES, *table(runs, reference)]))
    print(*problems(runs, reference), f"page       {files[0]}, {files[1]}", sep="\n", flush=True)
    return EXIT_FINISHED if all(run.problem is None for run in runs) else EXIT_FAILED


def find_runs(folder: Path) -> list[Run]:
    """The runs of a comparison in its order, or all runs in a folder."""
    return _recorded(folder) or _found(folder)


def _recorded(folder: Path) -> list[Run]:
    """The runs of an earlier comparison, in its order; empty if there is no readable record."""
    try:
        points = json.loads((folder / RECORD).read_text())
        return [read_run(point["name"], folder / point["name"], point["reason"]) for point in points]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _found(folder: Path) -> list[Run]:
    """The run folders in a folder and one level below, in natural order."""
    places = {file.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for file in folder.glob(pattern)}
    # The record of a run's second start is in the run's own folder.
    runs = [place.relative_to(folder).as_posix() for place in places if place.parent not in places]
    return [read_run(name, folder / name) for name in sorted(runs, key=_natural)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
