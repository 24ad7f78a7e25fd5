"""The training loop. It names no layout: what is split over what is the engine's business.

join the process group -> run folder -> data -> engine, restored -> steps, validated and saved -> export -> summary
"""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import torch

from configs.errors import EXIT_FINISHED, OutputFailed
from configs.schema import Config
from trainer.checkpoint.hub import export_model, generation_config
from trainer.checkpoint.keeper import Keeper
from trainer.checkpoint.progress import Progress, identity
from trainer.data import DataSet
from trainer.data.build import build_data
from trainer.engine import Engine, build_engine
from trainer.model.build import build_hf_config, text_config
from trainer.model.precision import export_dtype
from trainer.model.resize import settle_vocabulary
from trainer.model.weights import check_early
from trainer.optim.build import lr_at
from trainer.plan.plan import Plan
from trainer.process.disks import written
from trainer.process.exhausted import memory_told
from trainer.process.runtime import Runtime, dropout_stream, join_world
from trainer.process.status import RunStatus
from trainer.process.stopping import StopRequests
from trainer.process.watchdog import Watchdog, watched
from trainer.report.folder import open_run_folder
from trainer.report.measure import StepTimer
from trainer.report.prediction import MemoryCheck, predict
from trainer.report.reporter import Reporter
from trainer.run.preflight_ranks import preflight
from trainer.run.profiling import Profiler
from trainer.run.step import check_finite, train_step, validate


def run(config: Config, plan: Plan) -> int:
    """Train on this rank, from the first step or from where an earlier start left off. Returns the exit code.

    Raises CookbookError, the same on every rank, on what the user can mend.
    """
    settle_vocabulary(config)
    predicted = predict(config, plan)
    with join_world(plan, timeout_minutes=config.train.timeout_minutes) as runtime:
        folder = open_run_folder(config, plan, runtime)
        status = RunStatus(folder, runtime.rank)
        runtime.agree(status.begin)
        with (
            status,
            StopRequests(folder if runtime.is_main else None) as stop,
            Watchdog(folder, runtime, timeout_minutes=config.train.timeout_minutes),
        ):
            hf_config = runtime.agree(lambda: build_hf_config(config.model))
            runtime.agree(lambda: check_early(config.model, hf_config))
            preflight(config, plan, runtime, folder)
            generation = runtime.agree(lambda: generation_config(config.model) if runtime.is_main else None)
            data = _build_data(config, plan, runtime, vocab_size=text_config(hf_config).vocab_size)
            same = identity(config, hf_config, data)
            keeper = Keeper(
                config,
                plan,
                runtime,
                folder,
                identity=same,
                tokenizer=data.tokenizer,
                generation=generation,
                stop=stop,
            )
            status.follow(lambda: keeper.step)
            begin = keeper.find()
            # The parameters do not depend on this generator.
            torch.manual_seed(config.train.seed + dropout_stream(plan, runtime.rank))
            with (
                memory_told(runtime.rank, lambda: keeper.step),
                MemoryCheck(config, plan, runtime, predicted) as memory,
                Profiler(config, plan, runtime, folder, predicted) as profiler,
                closing(build_engine(config, plan, runtime)) as engine,
            ):
                keeper.restore(engine)
                totals = begin.report if begin else None
                reporter = Reporter(
                    config,
                    plan,
                    runtime,
                    folder,
                    model=engine.model,
                    data=data.describe(),
                    resumed=totals,
                    memory=memory,
                )
                with reporter:
                    told = train(engine, data, config, plan, runtime, reporter, keeper, profiler, begin)
                    if told is not None:
                        reporter.stopped(told)
                        return status.stopped(told)
                    if config.train.export:
                        runtime.agree(lambda: _export(engine, data, plan, folder / "model", generation))
                        reporter.exported(folder / "model")
    return EXIT_FINISHED


def _build_data(config: Config, plan: Plan, runtime: Runtime, *, vocab_size: int) -> DataSet:
    rank = plan.data_rank(runtime.rank)
    return runtime.agree(
        lambda: build_data(config, plan, data_rank=rank, vocab_size=vocab_size, local_rank=runtime.local_rank)
    )


def _export(engine: Engine, data: DataSet, plan: Plan, target: Path, generation: bytes | None) -> None:
    """A collective. Raises OutputFailed on the rank whose disk fails."""
    if target.exists():
        return  # an earlier start of this run was killed between the export and its last words
    parameters = watched(engine.parameters(), "the export")
    try:
        with written("the finished model", target):
            dtype = export_dtype(plan.param_dtype)
            export_model(parameters, engine.model, data.tokenizer, target, dtype=dtype, generation=generation)
    except OutputFailed:
        shutil.rmtree(target.with_name(f"{target.name}.partial"), ignore_errors=True)
        for _ in parameters:  # the other ranks count on this one in the collectives that gather the rest
            pass
        raise


def train(
    engine: Engine,
    data: DataSet,
    config: Config,
    plan: Plan,
    runtime: Runtime,
    reporter: Reporter,
    keeper: Keeper,
    profiler: Profiler,
    begin: Progress | None = None,
) -> str | None:
    """All steps from `begin` on, with validation before the first, after the last and every `train.eval_every` between
    them. Returns why the run was told to stop; None when it is through."""
    timer = StepTimer(runtime.device, profiler.mark)
    keeper.report_to(reporter.checkpoint)
    first, samples = (begin.step, begin.samples) if begin else (0, 0)
    steps = data.steps(samples // plan.batch.global_batch_size)
    evaluating = config.train.eval_samples > 0
    if evaluating and begin is None:
        reporter.validation(0, validate(engine, data, plan, runtime))
    for step in range(first, config.train.steps):
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
            reporter.validation(step + 1, validate(engine, data, plan, runtime))
        # After the validation: what is saved has it in its totals, and the run that goes on does not repeat it.
        told = keeper.after_step(step + 1, engine, samples=samples, report=reporter.progress)
        if told is not None and not last:
            return told
    return None
