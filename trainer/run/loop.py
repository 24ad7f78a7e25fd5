"""The training loop. It names no layout: the engine decides what is split over which ranks.

join the process group -> run folder -> data -> engine, restored -> steps, validated and saved -> export -> summary
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from configs.choices import NonFinite
from configs.errors import EXIT_FINISHED, OutputFailed
from configs.output import announce
from configs.schema import Config
from trainer.checkpoint.export import parameters_of
from trainer.checkpoint.hub import export_model, generation_config
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.progress import Progress, identity
from trainer.checkpoint.selection import METRIC, metric_of
from trainer.data import DataSet
from trainer.data.build import build_data
from trainer.engine import Engine, build_engine
from trainer.model.build import build_hf_config, text_config
from trainer.model.precision import export_dtype
from trainer.model.resize import settle_vocabulary
from trainer.model.weights import check_early
from trainer.optim.build import lr_at
from trainer.plan.length import settle
from trainer.plan.plan import Plan
from trainer.process.disks import written
from trainer.process.exhausted import memory_errors
from trainer.process.runtime import Runtime, dropout_stream, join_world
from trainer.process.status import RunStatus
from trainer.process.stopping import StopRequests
from trainer.process.watchdog import Watchdog, watched
from trainer.report.callbacks import Callback, Callbacks
from trainer.report.folder import open_run_folder, set_end_aside
from trainer.report.measure import StepTimer
from trainer.report.page import reported
from trainer.report.prediction import MemoryCheck, predict
from trainer.report.reporter import Reporter
from trainer.run.preflight_ranks import preflight
from trainer.run.profiling import Profiler
from trainer.run.sampling import Sampler, build_sampler
from trainer.run.step import check_finite, check_validation, train_step, validate

log = logging.getLogger(__name__)


def run(config: Config, plan: Plan, callbacks: Sequence[Callback] = ()) -> int:
    """Train on this rank, from the first step or from where an earlier start stopped. Returns the exit code.

    callbacks: in addition to those of `train.callbacks`.

    Raises CookbookError, the same on every rank, for problems that the user can fix.
    """
    called = Callbacks(config, callbacks)
    announce("predicting the memory")
    settle_vocabulary(config)
    predicted = predict(config, plan)
    announce(f"joining {plan.world_size} process(es)")
    with join_world(plan, timeout_minutes=config.train.timeout_minutes) as runtime:
        folder = open_run_folder(config, plan, runtime)
        status = RunStatus(folder, runtime.rank, epochs=config.train.epochs)
        runtime.agree(status.begin)
        with (
            reported(folder, main=runtime.is_main),
            status,
            StopRequests(folder if runtime.is_main else None) as stop,
            Watchdog(folder, runtime, timeout_minutes=config.train.timeout_minutes),
        ):
            hf_config = runtime.agree(lambda: build_hf_config(config.model))
            runtime.agree(lambda: check_early(config.model, hf_config))
            preflight(config, plan, runtime, folder)
            generation = runtime.agree(lambda: generation_config(config.model) if runtime.is_main else None)
            announce("reading the data")
            data = _build_data(config, plan, runtime, vocab_size=text_config(hf_config).vocab_size)
            planned, plan = plan, runtime.agree(lambda: settle(config, plan, data.length))
            if plan.steps != planned.steps:
                log.info(plan.tokens())
            sampler = runtime.agree(lambda: build_sampler(config, data, plan, runtime, generation))
            same = identity(config, hf_config, data)
            manager = CheckpointManager(
                config,
                plan,
                runtime,
                folder,
                identity=same,
                tokenizer=data.tokenizer,
                generation=generation,
                stop=stop,
            )
            status.follow(lambda: manager.step, manager.summary)
            begin = manager.find()
            announce("building the model")
            # The parameters do not depend on this generator.
            torch.manual_seed(config.train.seed + dropout_stream(plan, runtime.rank))
            with (
                memory_errors(runtime.rank, lambda: manager.step),
                MemoryCheck(config, plan, runtime, predicted) as memory,
                Profiler(config, plan, runtime, folder, predicted) as profiler,
                closing(build_engine(config, plan, runtime)) as engine,
            ):
                manager.restore(engine)
                if manager.step < config.train.steps:
                    runtime.agree(lambda: set_end_aside(folder, manager.step) if runtime.is_main else None)
                totals = begin.report if begin else None
                reporter = Reporter(
                    config,
                    plan,
                    runtime,
                    folder,
                    model=engine.model,
                    data=data.describe(),
                    samples_of=data.samples_of,
                    resumed=totals,
                    memory=memory,
                    callbacks=called,
                    ask=stop.ask,
                )
                with reporter:
                    reason = train(engine, data, config, plan, runtime, reporter, manager, profiler, sampler, begin)
                    if reason is not None:
                        reporter.stopped(reason)
                        return status.stopped(reason)
                    if (early := manager.selection.ended) is not None:
                        status.early(early)
                    if config.train.export:
                        model = folder / "model"
                        runtime.agree(lambda: _export(engine, data, plan, runtime, model, generation, manager.best()))
                        reporter.exported(model)
                    reporter.chosen(manager.summary().get("best"), early)
    return EXIT_FINISHED


def _build_data(config: Config, plan: Plan, runtime: Runtime, *, vocab_size: int) -> DataSet:
    rank = plan.data_rank(runtime.rank)
    return runtime.agree(
        lambda: build_data(config, plan, data_rank=rank, vocab_size=vocab_size, local_rank=runtime.local_rank)
    )


def _export(
    engine: Engine,
    data: DataSet,
    plan: Plan,
    runtime: Runtime,
    target: Path,
    generation: bytes | None,
    best: Path | None,
) -> None:
    """The current weights, or those of the best checkpoint. A collective. Raises OutputFailed on the rank whose disk
    fails."""
    if target.exists():
        return  # an earlier start of this run was killed between the export and its last message
    weights = engine.parameters() if best is None else parameters_of(best, engine.model, runtime)
    parameters = watched(weights, "the export")
    try:
        with written("the finished model", target):
            dtype = export_dtype(plan.param_dtype)
            export_model(parameters, engine.model, data.tokenizer, target, dtype=dtype, generation=generation)
    except OutputFailed:
        shutil.rmtree(target.with_name(f"{target.name}.partial"), ignore_errors=True)
        for _ in parameters:  # the other ranks need this one in the collectives that gather the rest
            pass
        raise


def _validate(
    engine: Engine,
    data: DataSet,
    plan: Plan,
    runtime: Runtime,
    reporter: Reporter,
    sampler: Sampler | None,
    step: int,
    non_finite: NonFinite,
) -> dict[str, float]:
    """Report and return the loss of each validation set, by metric; report generated samples. A collective. Raises
    TrainingFailed if a loss is not finite, unless such losses are to be skipped."""
    loss = validate(engine, data, plan, runtime)
    sets = {metric_of(name): validate(engine, data, plan, runtime, name) for name in data.validation_sets}
    reporter.validation(step, loss, sets)
    check_validation({METRIC: loss, **sets}, step, non_finite)
    if sampler is not None:
        reporter.samples(sampler.write(engine, step))
    return {METRIC: loss, **sets}


def train(
    engine: Engine,
    data: DataSet,
    config: Config,
    plan: Plan,
    runtime: Runtime,
    reporter: Reporter,
    manager: CheckpointManager,
    profiler: Profiler,
    sampler: Sampler | None = None,
    begin: Progress | None = None,
) -> str | None:
    """All steps from `begin` on, with a validation before the first, after the last and every `train.eval_every` steps.
    Returns why the run was asked to stop; None when it is finished."""
    timer = StepTimer(runtime.device, profiler.mark)
    manager.report_to(reporter.checkpoint)
    first, samples = (begin.step, begin.samples) if begin else (0, 0)
    steps = data.steps(samples // plan.batch.global_batch_size, begin.data if begin else None)
    evaluating = config.train.eval_samples > 0
    if evaluating and begin is None:
        _validate(engine, data, plan, runtime, reporter, sampler, 0, config.train.non_finite)
    for step in range(first, config.train.steps):
        if manager.selection.ended is not None:
            break
        with profiler.step(step + 1):
            with timer.data():
                batches = next(steps)
            lr = lr_at(config, step)
            result = train_step(engine, batches, plan, runtime, lr, timer)
            seconds = timer.finish()
        reporter.step(step + 1, result, lr, seconds)
        check_finite(result, step + 1, config.train.non_finite)
        samples += plan.batch.global_batch_size
        last = step + 1 == config.train.steps
        due = config.train.eval_every > 0 and (step + 1) % config.train.eval_every == 0
        if evaluating and (last or due):
            losses = _validate(engine, data, plan, runtime, reporter, sampler, step + 1, config.train.non_finite)
            manager.selection.judge(step + 1, losses)
        # After the validation: the checkpoint includes it in its totals, so a resumed run does not repeat it.
        reason = manager.after_step(step + 1, engine, samples=samples, data=data.mark, report=reporter.progress)
        if reason is not None and not last and manager.selection.ended is None:
            return reason
    return None
