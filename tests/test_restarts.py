"""The progress guard restarts a job only while restarts make progress."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from configs.choices import NonFinite
from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, TrainingFailed
from launch.process import Outcome, Relay
from launch.supervise import keep_running
from tests.support.harness import run_ranks
from tests.support.parity import words
from trainer.__main__ import main
from trainer.checkpoint.catalog import CHECKPOINTS, step_name
from trainer.process.status import STATUS, read_status
from trainer.run.restarts import Attempts, Decision, Standing, judge, read_standing
from trainer.run.step import check_validation


def verdicts(*ends: tuple[int, int], cap: int = 3) -> list[Decision]:
    """Return the decision after each start, up to the first one that does not restart.

    ends: exit code and step of the newest checkpoint, after each start.
    """
    decided, attempts, step = [], Attempts(), 0
    for code, reached in ends:
        before, after = Standing(step=step, status={}), Standing(step=reached, status={})
        verdict = judge(code, before=before, after=after, attempts=attempts, max_restarts=cap)
        decided.append(verdict)
        attempts, step = verdict.attempts, reached
        if not verdict.restart:
            break
    return decided


@pytest.mark.parametrize("code", [EXIT_FINISHED, EXIT_BAD_CONFIG, EXIT_STOPPED])
def test_what_is_over_is_not_started_again(code: int) -> None:
    assert [verdict.restart for verdict in verdicts((code, 10))] == [False]


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_a_job_that_always_dies_at_the_same_place_is_given_up(cap: int) -> None:
    decided = verdicts(*[(EXIT_FAILED, 0)] * 20, cap=cap)
    assert [verdict.restart for verdict in decided] == [True] * cap + [False]
    if cap:
        assert "restart 1 of" in decided[0].reason
        assert decided[-1].reason.endswith(f"restarts in a row from the beginning (launcher.max_restarts={cap})")


def test_a_restart_that_got_further_begins_the_count_again() -> None:
    steps = [10, 10, 10, 20, 20, 20, 30, 40, 50, 50, 50, 50, 50, 50]
    decided = verdicts(*((137, step) for step in steps), cap=3)
    # The first death at step 50 had just saved that checkpoint; three more restarts follow.
    assert len(decided) == steps.index(50) + 4
    assert [verdict.restart for verdict in decided] == [True] * (len(decided) - 1) + [False]
    assert "starting again from step 20 (restart 1 of 3 from there)" in decided[3].reason


def test_a_damaged_checkpoint_made_again_is_no_progress() -> None:
    decided = verdicts((1, 20), (1, 10), (1, 20), (1, 10), (1, 20), cap=3)
    assert [verdict.restart for verdict in decided] == [True, True, True, False]


def test_progress_of_an_earlier_job_is_not_this_ones() -> None:
    same = Standing(step=40, status={})
    verdict = judge(1, before=same, after=same, attempts=Attempts(), max_restarts=1)
    assert verdict.restart
    assert not judge(1, before=same, after=same, attempts=verdict.attempts, max_restarts=1).restart


def test_the_ranks_word_counts_more_than_the_launchers_exit_code() -> None:
    before = Standing(step=0, status={"state": "running"})

    def decide(**word: object) -> Decision:
        after = Standing(step=0, status={"state": "failed", **word})
        return judge(1, before=before, after=after, attempts=Attempts(), max_restarts=3)

    assert not decide(exit_code=EXIT_BAD_CONFIG, reason="data.paths=[x]: no such file").restart
    assert not decide(exit_code=EXIT_STOPPED, reason="rank 0: SIGTERM").restart
    full = decide(exit_code=EXIT_FAILED, retry=False, reason="no space")
    assert (full.restart, full.reason) == (False, "no space; it would end the same way again")
    hung = decide(exit_code=EXIT_FAILED, retry=True, reason="stuck for 10 min: rank 1 does not answer at all")
    assert hung.restart
    assert hung.reason.startswith("stuck for 10 min: rank 1 does not answer at all; starting again from the beginning")
    # The status of an earlier start does not apply to this one.
    old = Standing(step=0, status={"state": "failed", "exit_code": EXIT_BAD_CONFIG, "reason": "mended since"})
    verdict = judge(137, before=old, after=old, attempts=Attempts(), max_restarts=3)
    assert verdict.restart
    assert verdict.reason.startswith("exit code 137, and no rank left word why")


def test_a_run_folder_is_read_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert read_standing(run) == Standing(step=0, status={})
    for name in (step_name(2), step_name(10), f".{step_name(12)}.partial", f"{step_name(14)}.damaged"):
        (run / CHECKPOINTS / name).mkdir(parents=True)
    (run / STATUS).write_text(json.dumps({"state": "running"}))
    assert read_standing(run) == Standing(step=10, status={"state": "running"})
    (run / STATUS).write_text("{")
    assert read_standing(run) == Standing(step=10, status={})


def test_a_run_says_whether_starting_again_can_help(tmp_path: Path) -> None:
    """A restart from the same checkpoint would give the same non-finite loss."""
    diverging = words("gpt2", "single", "fp32", 6, "optimizer.lr=1e35", "cluster=cpu", f"train.run_dir={tmp_path}")
    assert run_ranks(1, main, diverging) == [EXIT_FAILED]
    status = read_status(tmp_path)
    assert (status["state"], status["retry"]) == ("failed", False)


def test_an_update_that_breaks_the_parameters_is_no_success(tmp_path: Path) -> None:
    """Loss and gradient of the only step are finite, but the updated parameters are not, and no later loss shows it."""
    given = ("optimizer.lr=1e38", "scheduler.warmup_steps=0", "train.eval_samples=2", f"train.run_dir={tmp_path}")
    assert run_ranks(1, main, words("gpt2", "single", "fp32", 1, *given)) == [EXIT_FAILED]
    status = read_status(tmp_path)
    assert (status["state"], status["retry"]) == ("failed", False)
    assert str(status["reason"]).startswith("step 1: validation_loss ")
    assert not list((tmp_path / CHECKPOINTS).glob("step-*"))


@pytest.mark.parametrize(
    ("step", "says"),
    [(0, "not finite, before any update; look at the weights"), (7, "not finite; try a smaller optimizer.lr")],
)
def test_all_validation_losses_that_are_not_finite_are_named(
    step: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {"validation_loss": math.nan, "validation_loss/code": 2.0, "validation_loss/prose": math.inf}
    problem = f"step {step}: validation_loss nan, validation_loss/prose inf: not finite"
    with pytest.raises(TrainingFailed) as raised:
        check_validation(losses, step, NonFinite.stop)
    assert str(raised.value).startswith(problem) and says in str(raised.value)
    check_validation(losses, step, NonFinite.skip)
    assert [record.getMessage() for record in caplog.records] == [problem]


def test_a_run_that_is_asked_to_stop_while_it_waits_was_stopped(tmp_path: Path) -> None:
    """status.json still says `running` from an earlier, killed start; the state is corrected."""
    (tmp_path / STATUS).write_text(json.dumps({"state": "running", "step": 3}))
    waiting = Outcome(code=EXIT_STOPPED, killed=None, to_stop=True, relay=Relay(sys.stderr), started=False)
    assert keep_running(lambda _again, _signals: waiting, tmp_path, max_restarts=3) == (EXIT_STOPPED, True)
    assert read_status(tmp_path)["state"] == "failed"
