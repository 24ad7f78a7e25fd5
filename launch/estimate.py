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

from configs import waiting
from configs.choices import EstimateFormat
from configs.door import Arguments, Door, one_line, parse_arguments, show, turn_away
from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, ConfigError, CookbookError, PlanError
from configs.imports.deepspeed import follow
from configs.imports.write import as_config, assumptions
from configs.interpolation import settle_clock
from configs.load import expand_sweep, load_config, record
from configs.output import delivered, guard_output
from configs.schema import Config
from launch.explore import explore_layouts
from launch.translated import translate
from trainer.estimate.estimate import estimate, on_part_of_the_cluster, planned_machine
from trainer.estimate.explain import explain
from trainer.estimate.gate import EXIT_DOES_NOT_FIT
from trainer.estimate.plot import save_plot
from trainer.estimate.render import Answer, render_csv, render_json, render_sweep, render_table
from trainer.estimate.search.render import render_search, render_search_json
from trainer.estimate.search.search import search
from trainer.estimate.suggest import largest_micro_batch, suggest
from trainer.estimate.tracing import NotEstimated
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine

DOOR = Door(
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
        arguments = parse_arguments(DOOR, settle_clock(sys.argv[1:] if argv is None else argv, datetime.now()))
        if arguments.show is not None:
            print(show(DOOR, arguments))
            return delivered(EXIT_FINISHED)
        return delivered(_answer_all(arguments))
    except CookbookError as error:
        return turn_away(error)
    finally:
        gc.enable()


@waiting.on("estimating the memory")
def answer(
    overrides: Sequence[str], *, config: Config | None = None, config_dir: str | None = None, compare: bool = False
) -> Answer:
    """Estimate one configuration.

    config: the composed overrides, if they are loaded already.
    compare: the estimate is one of several: no suggestions; fixed degrees may use only part of the cluster's GPUs.
    Raises CookbookError."""
    config = config or load_config(overrides, config_dir=config_dir)
    machine = planned_machine(config, find_machine({}))
    if compare:
        config = on_part_of_the_cluster(config, machine)
    plan = make_plan(config, machine)
    found = estimate(config, plan, alone=None if compare else 0)
    suggestions, largest = None, None
    if config.estimate.suggest and not compare:
        if found.fits:
            largest = largest_micro_batch(config, plan)
        elif found.too_large:
            suggestions = suggest(config, plan, machine, found)
    return Answer(
        overrides=tuple(overrides),
        config=record(config),
        plan=plan,
        estimate=found,
        suggestions=suggestions,
        largest_micro_batch=largest,
    )


def search_layouts(overrides: Sequence[str], config: Config) -> int:
    """Rank the cluster's layouts instead of estimating one. Returns the exit code. Raises CookbookError."""
    found = search(config, planned_machine(config, find_machine({})))
    as_json = config.estimate.format is EstimateFormat.json
    print(render_search_json(found, overrides) if as_json else render_search(found, overrides))
    return EXIT_FINISHED if found.best else EXIT_DOES_NOT_FIT


def _answer_all(arguments: Arguments) -> int:
    if arguments.sources:
        return _answer_translated(arguments)
    if not arguments.sweep:
        config = load_config(arguments.overrides, config_dir=arguments.config_dir)
        if config.estimate.explore is not None:
            return explore_layouts([arguments.overrides], config_dir=arguments.config_dir)
        if config.estimate.search:
            return search_layouts(arguments.overrides, config)
        answers = [answer(arguments.overrides, config=config)]
        refused: list[str] = []
    else:
        runs = expand_sweep(arguments.overrides)
        config = load_config(runs[0], config_dir=arguments.config_dir)
        if config.estimate.search:
            raise ConfigError("estimate.search=true: ranks the layouts of one configuration; leave out -m")
        if config.estimate.explore is not None:
            return explore_layouts(runs, config_dir=arguments.config_dir)
        answers, refused = _answer_sweep(runs, arguments.config_dir)
    if answers:
        print(_render(answers, config, sweep=arguments.sweep))
        if config.estimate.plot is not None:
            save_plot(answers, config.estimate.plot)
    for line in refused:
        print(one_line(line), file=sys.stderr)
    if any(one.estimate.too_large for one in answers):
        return EXIT_DOES_NOT_FIT
    return EXIT_BAD_CONFIG if refused else EXIT_FINISHED


def _answer_translated(arguments: Arguments) -> int:
    """The run that files of other trainers describe, and the assumptions that the answer rests on."""
    if arguments.sweep:
        raise ConfigError("--from: the files describe one configuration; leave out -m")
    made = translate(arguments.sources, arguments.overrides, config_dir=arguments.config_dir)
    made.assumed += follow(made.settings, made.compute)
    config = as_config(made)
    for key, asked in (("explore", config.estimate.explore is not None), ("search", config.estimate.search)):
        if asked:
            raise ConfigError(f"--from: estimate.{key} needs overrides; make them with `cookbook import` first")
    found = answer(arguments.overrides, config=config)
    print(_render([found], config, sweep=False))
    if config.estimate.plot is not None:
        save_plot([found], config.estimate.plot)
    print(assumptions(made), file=sys.stdout if config.estimate.format is EstimateFormat.table else sys.stderr)
    return EXIT_DOES_NOT_FIT if found.estimate.too_large else EXIT_FINISHED


def _answer_sweep(runs: Sequence[Sequence[str]], config_dir: str | None) -> tuple[list[Answer], list[str]]:
    """The answers, and one line for each problem of configurations without an answer."""
    answers: list[Answer] = []
    refused: list[str] = []
    for run in runs:
        try:
            answers.append(answer(run, config_dir=config_dir, compare=True))
        except (ConfigError, NotEstimated, PlanError) as error:
            refused += [f"{' '.join(run)}: {problem}" for problem in error.problems]
    return answers, refused


def _render(answers: list[Answer], config: Config, *, sweep: bool) -> str:
    match config.estimate.format:
        case EstimateFormat.json:
            return render_json(answers, sweep=sweep)
        case EstimateFormat.csv:
            return render_csv(answers)
        case EstimateFormat.table:
            if sweep:
                return render_sweep(answers)
            text = render_table(answers[0])
            explained = config.estimate.explain
            return text + explain(config, answers[0].plan, answers[0].estimate) if explained else text


if __name__ == "__main__":
    sys.exit(main())
