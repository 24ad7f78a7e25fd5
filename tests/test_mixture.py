"""`data.mixture`: the weights hold exactly and every source keeps its order, under every layout and after a resume.
The length of a run: `train.epochs`, `data.exhausted`, `scheduler.warmup_ratio`."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, DataError, PlanError
from configs.load import load_config
from tests.support.data_cases import Row, data_of, rows_of, rows_of_all_ranks, step_rows, words, write_jsonl
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from tests.test_data_chat import numbered, write_chats
from trainer.__main__ import main
from trainer.checkpoint.catalog import step_name
from trainer.data import IGNORED
from trainer.data.mixed import Turns
from trainer.data.mixture import SLOTS, shares
from trainer.make_plan import make_plan
from trainer.optim.build import lr_at
from trainer.plan.length import settle, steps_of
from trainer.plan.machine import Machine
from trainer.process.status import is_through, read_status


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates three sources: text in the cache, a stream, and conversations."""
    folder = tmp_path_factory.mktemp("sources")
    write_jsonl(folder / "code.jsonl", map(words, range(60)))
    (folder / "web").mkdir()
    write_jsonl(folder / "web" / "train.jsonl", map(words, range(100, 200)))
    write_chats(folder / "chats.jsonl", [numbered(number) for number in range(40)])
    return folder


def sources(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        "code": {"source": "files", "paths": [f"{folder}/code.jsonl"]},
        "web": {"source": "hub", "name": f"{folder}/web", "shuffle_buffer": 20},
        "chat": {"source": "chat", "paths": [f"{folder}/chats.jsonl"]},
    }


def alone(folder: Path, name: str) -> list[str]:
    """Returns overrides that make this source the only one."""
    return [*common(folder), *(f"data.{key}={value}" for key, value in sources(folder)[name].items())]


def common(folder: Path) -> list[str]:
    return [f"data.cache_dir={folder}/cache", "data.seq_len=96", "train.micro_batch_size=2"]


def mixture(folder: Path, **weights: float | None) -> list[str]:
    """Returns the overrides of a mixture.

    weights: weight of each source; None: the source has no weight.
    """
    given = {name: {} if weight is None else {"weight": weight} for name, weight in weights.items()}
    entries = [f"data.mixture.{name}={json.dumps({**sources(folder)[name], **given[name]})}" for name in weights]
    return [*common(folder), *(entry.replace('"', "") for entry in entries)]


def test_weights_hold_at_every_position() -> None:
    """No source is ever a whole sample ahead. After each round, every source has exactly its share."""
    for weights in ([3, 7], [0.7, 0.2, 0.1], [1, 1, 1], [1 / 3, 0.5], [0.61803, 0.2, 0.10197, 0.05, 0.03], [1e-4, 5]):
        turns = Turns(shares=tuple(shares(weights)))
        assert sum(turns.shares) <= SLOTS
        for share, weight in zip(turns.shares, weights, strict=True):
            assert abs(share / sum(turns.shares) - weight / sum(weights)) <= 1 / SLOTS
        for position in (1, 2, 7, 100, 4321, 5 * SLOTS + 3):
            read = turns.between(range(position))
            assert sum(read) == position
            assert all(
                count - position * share / sum(turns.shares) < 1
                for count, share in zip(read, turns.shares, strict=True)
            )
        assert turns.between(range(7, 7 + 3 * sum(turns.shares))) == [3 * share for share in turns.shares]
    assert (shares([3, 7]), shares([0.7, 0.2, 0.1]), shares([2.5])) == ([3, 7], [7, 2, 1], [1])


def test_every_source_keeps_its_own_order(folder: Path) -> None:
    data = data_of(*mixture(folder, code=5, web=3, chat=2))
    mixed = [row for step in step_rows(data, steps=40) for row in step]
    assert data.samples_of(range(80)) == {"code": 40, "web": 24, "chat": 16}
    left = mixed
    for name, count in data.samples_of(range(80)).items():
        own = [row for step in step_rows(data_of(*alone(folder, name)), steps=20) for row in step][:count]
        found = [row for row in left if row in own]
        assert found == own, name
        left = [row for row in left if row not in own]
    assert not left


def test_a_step_is_the_same_under_every_layout_and_after_every_resume(folder: Path) -> None:
    mix = mixture(folder, code=5, web=3, chat=2)
    reference = rows_of_all_ranks([*mix, "train.gradient_accumulation_steps=4"], ranks=1, steps=12)
    assert rows_of_all_ranks([*mix, "train.gradient_accumulation_steps=2"], ranks=2, steps=12) == reference
    first = data_of(*mix, "train.gradient_accumulation_steps=4", "data.num_workers=2")
    assert [sorted(row for batch in step for row in rows_of(batch)) for step in islice(first.steps(), 8)] == reference[
        :8
    ]
    mark = json.loads(json.dumps(first.mark()))
    assert mark["web"]["window"] > 10
    found: list[list[Row]] = [[] for _ in range(4)]
    for rank in range(4):
        again = data_of(*mix, ranks=4, data_rank=rank)
        for mine, step in zip(found, again.steps(8, mark), strict=False):
            mine += [row for batch in step for row in rows_of(batch)]
    assert [sorted(step) for step in found] == reference[8:]


def test_without_weights_every_sample_comes_once_in_an_epoch(folder: Path) -> None:
    mix = mixture(folder, code=None, chat=None)
    counts = {name: samples_in(data_of(*alone(folder, name))) for name in ("code", "chat")}
    total = sum(counts.values())
    data = data_of(*mix, "train.micro_batch_size=1")
    rows = [step[0] for step in step_rows(data, steps=2 * total)]
    assert data.samples_of(range(total)) == data.samples_of(range(total, 2 * total)) == counts
    assert Counter(rows[:total]) == Counter(rows[total:])
    assert rows[:total] != rows[total:]
    some = data.samples_of(range(3, 20))
    assert sum(some.values()) == 17
    assert min(some.values()) > 0


def samples_in(data: Any) -> int:
    return data.source.count


def test_validation_has_the_weights_too(folder: Path) -> None:
    data = data_of(*mixture(folder, code=5, chat=5), "data.validation_fraction=0.3", "train.eval_samples=1000")
    rows = [row for batch in data.validation() for row in rows_of(batch)]
    spoken = [row for row in rows if any(label != IGNORED for label in row[96:])]
    assert len(spoken) >= 10
    # The prompts of conversations have no labels.
    assert abs(sum(row[96] == IGNORED for row in spoken) - len(spoken) / 2) <= 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.mixture.code.wieght=3", "data.mixture.code.wieght: a source has no such key; did you mean weight?"),
        ("data.mixture.code.weight=0", "data.mixture.code.weight=0: must be a number greater than 0"),
        ("data.mixture.code=3", "data.mixture.code=3: must be the keys of a source, such as {weight: 1, paths: ["),
        ("data.mixture.code.seq_len=8", "data.mixture.code.seq_len=8: is the same for all sources; set data.seq_len"),
        (
            "data.mixture.code.source=hup",
            "data.mixture.code.source=hup: choose builtin, files, chat, hub, synthetic, ",
        ),
        ("data.mixture.code.paths=[]", "data.mixture.code: data.paths=[]: data=files needs at least one file, "),
        ("data.mixture.code.weight=null", "data.mixture.code.weight=null: web has one; give every source a weight, or"),
        ("data.mixture.code.weight=1e-6", "data.mixture.code.weight=1e-06: is less than 1/65,536 of all weights, and"),
        ("data.mixture.web.weight=null", "data.mixture.web.weight=null: code has one; give every source a weight, or"),
        ("data.exhausted=stop", "data.exhausted=stop: the end of data=hub is not known; set it to repeat"),
        (
            "data.mixture.code.validation_sets={v:[v.txt]}",
            "data.mixture.code.validation_sets={'v': ['v.txt']}: is the same for all sources; set data.validation_sets",
        ),
        ("data.validation_sets={v:[v.txt]}", "data.validation_sets={'v': ['v.txt']}: is for data=files or data=chat, "),
        ("train.epochs=2", "train.epochs=2: how many samples data=hub has is not known; give train.steps"),
        (
            "train.epochs=2 train.steps=7",
            "train.epochs=2: train.steps=7 says how long the run is; give one of them (train.steps=100 is as if it",
        ),
        (
            "scheduler.warmup_ratio=0.1 scheduler.warmup_steps=3",
            "scheduler.warmup_ratio=0.1: scheduler.warmup_steps=3 says how long the warm-up is; give one of them",
        ),
    ],
)
def test_what_is_refused_before_anything_is_read(folder: Path, override: str, says: str) -> None:
    config = load_config([*mixture(folder, code=1, web=1), *override.split()])
    with pytest.raises(PlanError) as raised:
        make_plan(config, Machine(world_size=1))
    assert [problem for problem in raised.value.problems if problem.startswith(says)], raised.value.problems


def test_validation_sets_are_read_as_data_says_whatever_the_sources_are(folder: Path, tmp_path: Path) -> None:
    """The validation set is a text file, which neither a chat source nor a stream could read."""
    (tmp_path / "own.txt").write_text("Text to validate on. " * 40)
    mix = [*mixture(folder, web=1, chat=1), "data=files", f"data.validation_sets={{own: [{tmp_path}/own.txt]}}"]
    ids = next(data_of(*mix).validation("own")).input_ids[0].tolist()
    assert bytes(ids[:40]).decode() in "Text to validate on. " * 3
    (tmp_path / "own.txt").write_text("Hi.")
    with pytest.raises(DataError, match=r"^data\.validation_sets\.own=.*: 4 tokens do not fill one sample"):
        data_of(*mix)


def test_a_source_that_cannot_be_read_is_named(folder: Path) -> None:
    absent = ["data.mixture.code.paths=[absent.txt]", "data.mixture.chat.paths=[absent.jsonl]"]
    with pytest.raises(DataError) as raised:
        data_of(*mixture(folder, code=1, chat=1), *absent)
    assert [problem[:40] for problem in raised.value.problems] == [
        "data.mixture.code: data.paths=absent.txt",
        "data.mixture.chat: data.paths=absent.jso",
    ]


def test_the_run_is_as_long_as_the_data_says(folder: Path) -> None:
    count = samples_in(data_of(*alone(folder, "code")))
    for epochs in (1, 2.5, 0.1):
        assert data_of(*alone(folder, "code"), f"train.epochs={epochs}").length == ceil(epochs * count / 2)
    stopped = data_of(*alone(folder, "code"), "train.steps=1000", "data.exhausted=stop")
    assert stopped.length == count // 2
    mix = [*mixture(folder, code=1, chat=9), "train.steps=1000", "data.exhausted=stop"]
    of_chat = samples_in(data_of(*alone(folder, "chat")))
    read = data_of(*mix).samples_of(range(2 * data_of(*mix).length))
    assert of_chat - 2 <= read["chat"] <= of_chat
    assert "(2 epochs in" in data_of(*alone(folder, "code"), "train.epochs=2").describe()
    with pytest.raises(
        DataError, match=r"^data\.exhausted=stop: the data ends after \d+ samples, before a step of 400;"
    ):
        data_of(*alone(folder, "code"), "data.exhausted=stop", "train.micro_batch_size=400")


def test_warmup_as_a_ratio() -> None:
    config = load_config(["parallel=single", "cluster.device=cpu", "train.epochs=3", "scheduler.warmup_ratio=0.1"])
    plan = make_plan(config, Machine(world_size=1))
    assert plan.steps == 0
    assert "as many steps as 3 epochs of the data take" in plan.describe()
    plan = settle(config, plan, steps_of(config, plan.batch, count=1001, until_exhausted=None))
    assert plan.steps == ceil(3 * 1001 / 8) == 376
    assert next(step for step in range(376) if lr_at(config, step) == config.optimizer.lr) == ceil(37.6) - 1
    assert lr_at(config, 375) == pytest.approx(0.1 * config.optimizer.lr)
    config.scheduler.decay_steps = 350
    with pytest.raises(PlanError, match=r"^scheduler\.warmup_ratio=0\.1 \(38 steps\): with scheduler\.decay_steps=350"):
        settle(config, plan, 376)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(folder: Path, *overrides: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Runs the trainer's entry point and returns the lines of its metrics."""
    usual = ["model=tiny", "cluster=cpu", "data.tokenizer=bytes", "logging.progress=off", "train.export=false"]
    usual += [
        "train.micro_batch_size=null",
        "train.global_batch_size=4",
        f"parallel={'ddp' if ranks > 1 else 'single'}",
    ]
    assert run_ranks(ranks, run_trainer, [*overrides, *usual, f"train.run_dir={folder}"]) == [EXIT_FINISHED] * ranks
    return [line for line in metrics(folder) if line["kind"] in ("step", "summary")]


def test_a_run_goes_on_with_more_ranks(folder: Path, tmp_path: Path) -> None:
    """The losses and the token counts of each source continue from the checkpoint."""
    mix = [*mixture(folder, code=5, web=3, chat=2), "train.eval_samples=0", "train.steps=10", "checkpoint.every=6"]
    whole = start(tmp_path / "whole", *mix)
    assert whole[9]["tokens_of"] == whole[10]["tokens_of"] == {"code": 20 * 96, "web": 12 * 96, "chat": 8 * 96}
    begin = tmp_path / "whole" / "checkpoints" / step_name(6)
    resumed = start(tmp_path / "more", *mix, f"train.resume={begin}", ranks=2)
    assert [line["tokens_of"] for line in resumed] == [line["tokens_of"] for line in whole[6:]]
    losses = [[line["loss"] for line in lines if line["kind"] == "step"] for lines in (resumed, whole[6:])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_of_epochs(folder: Path, tmp_path: Path) -> None:
    words = [*alone(folder, "code"), "train.epochs=0.5", "scheduler.warmup_ratio=0.5", "optimizer.lr=1"]
    lines = start(tmp_path / "run", *words, "train.eval_samples=0", "checkpoint.final=false")
    steps = ceil(samples_in(data_of(*alone(folder, "code"))) / 2 / 4)
    assert lines[-1]["steps"] == len(lines) - 1 == steps
    assert [line["lr"] for line in lines[:-1]].index(1.0) == ceil(steps / 2) - 1


def test_a_finished_run_of_epochs_is_through_until_more_are_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The length of the run is unknown before the data is read, so its status records the requested epochs."""
    run = tmp_path / "run"
    words = [*alone(folder, "code"), "model=tiny", "model.config.num_hidden_layers=1", "parallel=single", "cluster=cpu"]
    words += ["data.tokenizer=bytes", "train.eval_samples=0", "logging.progress=off", f"train.run_dir={run}"]
    constant, cosine = [*words, "scheduler=constant"], words

    def started(words: list[str], epochs: float) -> tuple[int, str]:
        code = main([*words, f"train.epochs={epochs}"])
        return code, capsys.readouterr().err

    assert started(constant, 0.1)[0] == EXIT_FINISHED
    steps = read_status(run)["step"]
    code, said = started(constant, 0.1)
    assert (code, read_status(run)["step"], (run / "resumed").exists()) == (EXIT_FINISHED, steps, False)
    assert f"this run is finished, at step {steps}; to train on, give more train.epochs with" in said
    code, said = started(cosine, 0.2)
    assert code == EXIT_BAD_CONFIG
    assert f"train.epochs=0.2: the run in {run} is finished, at step {steps}, and scheduler=cosine" in said
    assert started(constant, 0.2)[0] == EXIT_FINISHED
    assert read_status(run)["step"] == data_of(*alone(folder, "code"), "train.epochs=0.2").length
    elsewhere = [*constant, f"train.resume={run}", f"train.run_dir={tmp_path / 'next'}", "train.export=false"]
    code, said = started(elsewhere, 0.1)
    assert code == EXIT_FINISHED
    assert f"and this run has {steps} steps, all in all: nothing is left to train; give more train.steps, or" in said
    # The supervisor of a job makes the same check with the submitted settings.
    asked = {epochs: is_through(read_status(run), steps=0, epochs=epochs) for epochs in (0.1, 0.2, 0.3)}
    assert asked == {0.1: True, 0.2: True, 0.3: False}
