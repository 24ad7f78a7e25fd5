"""`python -m launch compare` runs three layouts and writes a page about them. It also reads damaged folders."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, CookbookError, EnvironmentProblem
from configs.load import expand_sweep
from launch.__main__ import main
from launch.comparison import figures
from launch.comparison.page import HTML, MARKDOWN, write_page
from launch.comparison.runs import distance
from launch.comparison.table import memory_by_rank
from launch.points import names, plan_points
from tests.support.harness import run_ranks
from tests.support.reports import read_metrics
from tests.support.warm import programs
from trainer.__main__ import main as train
from trainer.report.reading import Run, read_run

ROOT = Path(__file__).parent.parent
COMMON = (
    "model=tiny",
    "precision=fp64",
    "data=synthetic",
    "data.seq_len=16",
    "train.steps=3",
    "train.eval_samples=4",
    "cluster=cpu",
    "estimate.measure=true",
)
POINTS = ("parallel=single,ddp,tensor,zero3", *COMMON, "train.micro_batch_size=2", "train.run_dir=compared")
FINISHED = ("single", "ddp", "tensor")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a comparison of three layouts and one that is refused."""
    folder = tmp_path_factory.mktemp("comparison")
    done = subprocess.run(
        [programs().python, "-m", "launch", "compare", *POINTS],
        cwd=folder,
        env=programs().environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    heard = done.stdout + done.stderr
    assert done.returncode == EXIT_BAD_CONFIG, heard
    assert "Traceback" not in heard
    assert "train.global_batch_size=4 for all; each alone would have had 2 (tensor), 4 (ddp)\n" in heard
    return folder / "compared"


def rows(folder: Path) -> dict[str, list[str]]:
    """Returns the cells of each row of the page's first table, by the run's name in the row's first cell."""
    table = (folder / MARKDOWN).read_text().partition("\n| ")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


def test_the_page_has_the_numbers_of_the_runs(compared: Path) -> None:
    found, html = rows(compared), (compared / HTML).read_text()
    assert tuple(found) == FINISHED
    for name in FINISHED:
        summary: dict[str, Any] = read_metrics(compared / name)[-1]
        memory = summary["memory"]
        expected = [
            f"{summary['loss_last']:.4f}",
            f"{summary['validation_loss_last']:.4f}",
            f"{summary['tokens_per_second']:,.0f}",
            f"{max(memory['predicted_bytes_by_rank']) / 2**20:,.2f}",
            f"{max(memory['measured_bytes_by_rank']) / 2**20:,.2f}",
        ]
        row = found[name]
        assert [row[1], row[2], row[5], row[7], row[8]] == expected
        assert all(f"<td>{cell}</td>" in html for cell in row)
    assert html.count('src="data:image/png;base64,iVBORw0') == 2 and not re.search("https?:", html)
    assert all((compared / name).stat().st_size > 5000 for name in ("comparison-loss.png", "comparison-speed.png"))


def test_layouts_are_held_against_one_process(compared: Path) -> None:
    single, *others = (read_run(name, compared / name) for name in FINISHED)
    assert rows(compared)["single"][0] == "the reference"
    for run in others:
        apart = distance(run, single)
        assert apart is not None and apart.steps == 3 and run.tokens_per_step == single.tokens_per_step == 64
        assert apart.loss is not None and apart.loss < 1e-10
        assert apart.grad_norm is not None and apart.grad_norm < 1e-10


def test_a_run_that_is_refused_is_on_the_page_with_its_reason(compared: Path) -> None:
    for name in (HTML, MARKDOWN):
        assert "zero3: precision.param_dtype=float64: DeepSpeed has no float64" in (compared / name).read_text()
    assert not (compared / "zero3").exists()


def test_what_is_finished_is_not_run_again(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(compared.parent)
    before = {name: (compared / name / "metrics.jsonl").stat().st_mtime_ns for name in FINISHED}
    (compared / HTML).unlink()
    assert main(["compare", *POINTS]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().out.count("finished already\n") == len(FINISHED)
    assert before == {name: (compared / name / "metrics.jsonl").stat().st_mtime_ns for name in FINISHED}
    assert (compared / HTML).exists()
    assert main(["compare", "parallel=single,ddp", *POINTS[1:], "train.steps=4"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.endswith(
        "compared/single: holds a run without train.steps=4; choose another train.run_dir, or delete that run\n"
    )


def test_damaged_and_failed_runs_are_reported_and_another_seed_is_seen(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command reads only folders, as a sweep leaves them."""
    for name in FINISHED:
        shutil.copytree(compared / name, tmp_path / name)
    with open(tmp_path / "ddp/metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    status = json.loads((tmp_path / "tensor/status.json").read_text())
    status |= {"state": "failed", "step": 2, "reason": "rank 1: killed"}
    (tmp_path / "tensor/status.json").write_text(json.dumps(status))
    words = [
        "parallel=single",
        *COMMON,
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "train.export=false",
        "train.seed=1",
    ]
    assert run_ranks(1, train, [*words, f"train.run_dir={tmp_path}/other"]) == [0]

    assert main(["compare", str(tmp_path)]) == EXIT_FAILED
    shown, found = capsys.readouterr().out, rows(tmp_path)
    assert set(found) == {"single", "other"}
    reference = next(name for name, row in found.items() if row[0] == "the reference")
    (other,) = found.keys() - {reference}
    assert found[other][0] in ("train.seed=0", "train.seed=1")
    assert all(float(cell) > 1e-6 for cell in found[other][3:5]), "another seed, other losses"
    problems = {"ddp: metrics.jsonl: line 7 is damaged", "tensor: failed at step 2: rank 1: killed"}
    for text in (shown, (tmp_path / HTML).read_text(), (tmp_path / MARKDOWN).read_text()):
        assert all(problem in text for problem in problems)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["parallel=ddp"], "needs at least two runs"),
        (["model=tiny,tiny_gpt2"], "model=tiny_gpt2: not so in every run"),
        (["parallel=single,ddp", "train.steps=1,2"], "train.steps=2: not so in every run"),
        (["train.global_batch_size=8,16"], "is 8 (global_batch_size-8), 16 (global_batch_size-16)"),
        (["parallel=single,ddp", "cluster=slurm"], "cluster.kind=slurm: compare runs"),
        (["parallel=single,ddp", "cluster.nodes=2", "cluster.gpus_per_node=1"], "cluster.nodes=2"),
        (["parallel=zero1,zero2", "precision=fp64"], "DeepSpeed has no float64"),
        (["train.seed=1,2", "train.run_dir=a,b"], "train.run_dir: is the folder of the whole comparison"),
        (["parallel=single,ddq"], "no such option"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(CookbookError) as caught:
        plan_points(["cluster.device=cpu", *words], config_dir=None)
    assert problem in str(caught.value)


def test_all_points_get_one_batch_that_each_can_make() -> None:
    words = ["cluster=cpu", "train.micro_batch_size=3", "train.run_dir=x y", "parallel=single,ddp,pipeline"]
    folder, points = plan_points(words, config_dir=None)
    batches = {point.name: point.plan and point.plan.batch.global_batch_size for point in points}
    assert (folder, batches) == (Path("x y"), {"single": 12, "ddp": 12, "pipeline": 12})
    assert [point.config and point.config.train.run_dir for point in points] == [
        "x y/single",
        "x y/ddp",
        "x y/pipeline",
    ]


def test_names_say_what_differs() -> None:
    runs = expand_sweep(["parallel=single,ddp", "train.seed=1,2", "cluster=cpu"])
    assert names([tuple(words) for words in runs]) == ["single-seed-1", "single-seed-2", "ddp-seed-1", "ddp-seed-2"]


def test_a_machine_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    assert main(["compare", "parallel=single,ddp"]) == EXIT_BAD_CONFIG
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / MARKDOWN).write_text("# My notes\n")
    with pytest.raises(EnvironmentProblem, match="is no comparison of this program"):
        write_page(tmp_path, [read_run("none", tmp_path / "none")], command="")
    assert sorted(file.name for file in tmp_path.iterdir()) == [MARKDOWN]


def test_ranks_that_are_not_alike_have_rows_of_their_own() -> None:
    memory = {"predicted_bytes_by_rank": [2**20, 2**20, 2**21], "measured_bytes_by_rank": [2**20, 2**20, 2**22]}
    runs = [
        Run(name="even", problem=None, summary={"memory": {"predicted_bytes_by_rank": [5, 5]}}),
        Run(name="uneven", problem=None, summary={"memory": memory}),
    ]
    assert memory_by_rank(runs) == [("uneven", "0-1", "1.00", "1.00"), ("uneven", "2", "2.00", "4.00")]
