"""`cookbook report RUN_DIR`: writes RUN_DIR/report.html and prints the loss curve, from the run's folder.

A run writes its page when it ends. This command also works while it is under way, and for runs of earlier versions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from configs.entry_point import Parser
from configs.errors import EXIT_FINISHED, ConfigError
from configs.output import delivered
from trainer.process.answering import answered
from trainer.report.page import write_report
from trainer.report.picture import loss_picture, readable_by
from trainer.report.reading import read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page. Returns the exit code: 0, or 2 if there is no run or the page cannot be written."""
    return answered(lambda: _report(argv))


def _report(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="cookbook report", description="Write RUN_DIR/report.html, a run on one page.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, whether it is through or not")
    folder: Path = parser.parse_args(argv).run_dir.expanduser()
    run = read_run(folder.name, folder)
    if run.config is None:
        raise ConfigError(f"{folder}: holds no run ({run.problem}); give the folder of one")
    file = write_report(folder)
    if readable_by(sys.stdout.encoding) and (drawn := loss_picture(run.losses, run.validations)) is not None:
        print(drawn)
    if run.problem is not None:
        print(f"state      {run.problem}")
    print(f"report     {file}")
    return delivered(EXIT_FINISHED)


if __name__ == "__main__":
    sys.exit(main())
