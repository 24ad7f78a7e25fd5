"""`memory-estimate`: the memory per GPU of exactly the configuration that is about to run. Runs nothing.

    memory-estimate model=llama3_1_8b parallel=fsdp precision=bf16 cluster=8xh100 data.seq_len=4096
    memory-estimate -m parallel=ddp,fsdp model=llama3_1_70b cluster.nodes=8
    memory-estimate --from ds_config.json --from args.json model.path=FOLDER cluster=8xh100

The overrides are the trainer's. Exit code: 0 fits or tight, 3 does not fit, 2 a mistake in the overrides.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from datetime import datetime

from configs.entry_point import Arguments, EntryPoint, parse_arguments, print_problems, show
from configs.errors import EXIT_FINISHED, CookbookError
from configs.interpolation import settle_clock
from configs.load import load_config
from configs.output import delivered, guard_output

ENTRY_POINT = EntryPoint(
    program="memory-estimate",
    purpose="Predict the memory that a training run needs on each GPU. Needs no GPU, no weights and no network.",
    examples=(
        ("memory-estimate model=llama3_1_8b parallel=fsdp precision=bf16 cluster=8xh100", "one configuration"),
        ("memory-estimate -m parallel=ddp,fsdp model=llama3_1_70b cluster.nodes=8", "several, compared"),
        ("memory-estimate model=qwen3_8b parallel=fsdp estimate.format=json", "for programs"),
        ("memory-estimate --from ds_config.json --from args.json cluster=8xh100", "the run of another trainer"),
        ("memory-estimate model=llama3_1_70b cluster=8xh100 cluster.nodes=8 estimate.search=true", "which layout?"),
        ("memory-estimate model=llama3_1_8b cluster=8xh100 estimate.explore=8b.html", "a page to try them all"),
    ),
    sweeps=True,
    translates=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the overrides. Returns the exit code."""
    # Millions of small tuples are made and freed by reference count; garbage collection among them finds nothing and
    # takes a sixth of the time. Tracing creates cycles, and collects them itself.
    gc.disable()
    guard_output()
    try:
        arguments = parse_arguments(ENTRY_POINT, settle_clock(sys.argv[1:] if argv is None else argv, datetime.now()))
        if arguments.show is not None:
            print(show(ENTRY_POINT, arguments))
            return delivered(EXIT_FINISHED)
        return delivered(_answer(arguments))
    except CookbookError as error:
        return print_problems(error)
    finally:
        gc.enable()


def _answer(arguments: Arguments) -> int:
    """A mistake in the configuration is answered before the estimator is imported, which takes as long again."""
    alone = not (arguments.sources or arguments.sweep)
    config = load_config(arguments.overrides, config_dir=arguments.config_dir) if alone else None
    from launch.answers import answer_all

    return answer_all(arguments, config)


if __name__ == "__main__":
    sys.exit(main())
