"""What `memory-estimate` prints: one configuration's memory, several compared, layouts ranked, or a page.

What only some of these answers need is imported by them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from configs import waiting
from configs.choices import EstimateFormat
from configs.entry_point import Arguments, one_line
from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, ConfigError, PlanError
from configs.load import expand_sweep, load_config, record
from configs.schema import Config
from trainer.estimate.estimate import estimate, on_part_of_the_cluster, planned_machine
from trainer.estimate.gate import EXIT_DOES_NOT_FIT
from trainer.estimate.render import Answer, render_csv, render_json, render_sweep, render_table
from trainer.estimate.suggest import largest_micro_batch, suggest
from trainer.estimate.tracing import NotEstimated
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine


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
            largest = largest_micro_batch(config, plan, first=found)
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
    from trainer.estimate.search.render import render_search, render_search_json
    from trainer.estimate.search.search import search

    found = search(config, planned_machine(config, find_machine({})))
    as_json = config.estimate.format is EstimateFormat.json
    print(render_search_json(found, overrides) if as_json else render_search(found, overrides))
    return EXIT_FINISHED if found.best else EXIT_DOES_NOT_FIT


def answer_all(arguments: Arguments, config: Config | None) -> int:
    """Print what `memory-estimate` answers. config: what the arguments say, if it is one configuration of this trainer.
    Returns the exit code. Raises CookbookError."""
    if arguments.sources:
        return _answer_translated(arguments)
    if config is not None:
        if config.estimate.explore is not None:
            from launch.explore import explore_layouts

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
            from launch.explore import explore_layouts

            return explore_layouts(runs, config_dir=arguments.config_dir)
        answers, refused = _answer_sweep(runs, arguments.config_dir)
    if answers:
        print(_render(answers, config, sweep=arguments.sweep))
        _draw(answers, config)
    for line in refused:
        print(one_line(line), file=sys.stderr)
    if any(one.estimate.too_large for one in answers):
        return EXIT_DOES_NOT_FIT
    return EXIT_BAD_CONFIG if refused else EXIT_FINISHED


def _answer_translated(arguments: Arguments) -> int:
    """The run that files of other trainers describe, and the assumptions that the answer rests on."""
    from configs.imports.deepspeed import follow
    from configs.imports.write import as_config, assumptions
    from launch.translated import translate

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
    _draw([found], config)
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


def _draw(answers: Sequence[Answer], config: Config) -> None:
    if config.estimate.plot is not None:
        from trainer.estimate.plot import save_plot

        save_plot(answers, config.estimate.plot)


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
            if not config.estimate.explain:
                return text
            from trainer.estimate.explain import explain

            return text + explain(config, answers[0].plan, answers[0].estimate)
