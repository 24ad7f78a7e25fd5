"""RUN_DIR/report.html and the terminal's loss curve, for runs that finish, fail, are resumed or are damaged."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from launch.cookbook import main as cookbook
from tests.support.browser import browser
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from trainer.report.curves import Series, draw
from trainer.report.page import report, report_end
from trainer.report.picture import loss_picture

TRAIN = ["model=tiny", "data=builtin", "data.seq_len=32", "parallel=single", "launcher=python", "cluster.device=cpu"]
TRAIN += ["model.config.num_hidden_layers=1", "train.eval_samples=4", "train.export=false", "scheduler=constant"]
ROWS = ("tensors, predicted", "tensors, measured in the first two updates", "largest process, resident")


def several(runs: list[list[str]]) -> list[tuple[int, str]]:
    """Return each run's exit code and output."""
    found: list[tuple[int, str]] = []
    for words in runs:
        heard = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            code = run_trainer(words)
            heard.flush()
        found.append((code, heard.buffer.getvalue().decode()))  # pyright: ignore[reportAttributeAccessIssue]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """Return the folder with the runs `whole` (resumed once) and `failed`, and their exit codes and outputs."""
    folder = tmp_path_factory.mktemp("runs")
    whole = [*TRAIN, f"train.run_dir={folder / 'whole'}", "estimate.measure=true"]
    failed = [*TRAIN, f"train.run_dir={folder / 'failed'}", "train.steps=9", "optimizer.lr=1e30"]
    words = [[*whole, "train.steps=3", "logging.curve=true"], [*whole, "train.steps=5"], failed]
    return folder, run_ranks(1, several, words)[0]


def test_a_run_leaves_a_page_however_it_ends(runs: tuple[Path, list[tuple[int, str]]]) -> None:
    folder, ended = runs
    assert [code for code, _ in ended] == [0, 0, 1]
    page = unescape((folder / "whole/report.html").read_text())
    assert '<p class="good">finished: step 5 of 5</p>' in page
    last = ended[1][1].splitlines()
    assert all(line in page for line in last[last.index(next(x for x in last if x.startswith("finished"))) :])
    assert (folder / "whole/resumed/002/plan.txt").read_text() in page
    assert page.count("<svg") == 4 and all(f"<td>{row}</td>" in page for row in ROWS)
    for name, size in json.loads((folder / "whole/prediction.json").read_text())["components"].items():
        assert f"{name} {size / 2**20:.0f} MiB" in page
    # The device reports only a total; its bar is below the predicted one, on the same scale.
    sums = json.loads((folder / "whole/summary.json").read_text())["memory"]
    share = sums["measured_allocated_bytes"] / sums["predicted_allocated_bytes"]
    assert f"which is {share:.1%} of it:" in page and 'title="measured: ' in page
    widths = [float(found) for found in re.findall(r'"bar" style="width:([\d.]+)%', page)]
    assert widths == pytest.approx([100 / max(share, 1), 100 * min(share, 1)], abs=0.11)
    failed = unescape((folder / "failed/report.html").read_text())
    reason = json.loads((folder / "failed/status.json").read_text())["reason"]
    assert "not finite" in reason and '<p class="problem">failed at step' in failed and reason in failed
    assert (folder / "whole/report.html").stat().st_mode == (folder / "whole/argv.json").stat().st_mode


def test_the_curve_is_drawn_where_it_is_wished_for(runs: tuple[Path, list[tuple[int, str]]]) -> None:
    """A pipe is not a terminal, so the curve is drawn there only on request."""
    (_, asked), (_, unasked), _ = runs[1]
    assert asked.count("o validation") == 1 and "(loss)" in asked and "⠀" in asked
    assert "(loss)" not in unasked and "⠀" not in unasked


def test_the_page_in_a_browser(runs: tuple[Path, list[tuple[int, str]]], tmp_path: Path) -> None:
    file = runs[0] / "whole/report.html"
    with browser(tmp_path) as page:
        page.open(file)
        for width, dark in ((360, False), (1280, True)):
            page.show(width=width, height=1000, dark=dark)
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("Math.min(...[...document.querySelectorAll('svg')].map(s => s.clientWidth))") > 300
        assert page.run("document.querySelectorAll('circle').length") >= 3  # a validation at the start and at each end
        assert page.wrong == [] and page.asked == [file.as_uri()]


def test_it_is_made_of_what_a_folder_holds(
    runs: tuple[Path, list[tuple[int, str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0] / "whole", run)
    assert cookbook(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "o validation\n" in shown and shown.endswith(f"report     {run / 'report.html'}\n")
    (run / "resumed/002/argv.json").write_text(json.dumps(["/here/trainer/__main__.py", "train.steps=4", "a=b c"]))
    assert "<pre>python -m launch train.steps=4 'a=b c'</pre>" in unescape(report(run))
    # A killed rank writes no page of its end, and its launcher corrects status.json.
    status = json.loads((run / "status.json").read_text()) | {
        "state": "failed",
        "reason": "rank 0 was killed by SIGKILL",
    }
    (run / "status.json").write_text(json.dumps(status))
    report_end(run, failing=False)
    assert "rank 0 was killed by SIGKILL" in (run / "report.html").read_text()
    for name in ("summary.json", "versions.json", "git.json", "prediction.json", "resumed", "argv.json"):
        shutil.rmtree(run / name) if name == "resumed" else (run / name).unlink()
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-20])
    assert "metrics.jsonl: line" in report(run)
    (run / "config.yaml").unlink()
    assert cookbook(["report", str(run)]) == 2
    assert capsys.readouterr().err == f"{run}: holds no run (config.yaml: missing or damaged); give the folder of one\n"


def test_curves_of_any_length() -> None:
    long = draw("loss", [Series("training", {step: 9.0 if step == 7000 else 1.0 for step in range(1, 50_000)})])
    assert len(long) < 20_000 and "<polygon" in long, "a spike of one step is seen in the band"
    assert "<circle" in draw("loss", [Series("training", {1: 0.0})]) and draw("loss", [Series("training", {})]) == ""
    assert "&lt;b&gt;" in draw("<b>", [Series("<b>", {1: 1.0, 2: 2.0})])
    assert loss_picture({1: 2.0}, {}) is None and loss_picture({1: float("nan"), 2: 2.0}, {}) is None
    for losses in ({1: 2.0, 2: 2.0}, {step: step**0.5 for step in range(1, 50_000)}):
        drawn = loss_picture(losses, {}) or ""
        assert drawn.count("\n") < 15 and max(map(len, drawn.splitlines())) < 100


def test_the_busiest_rank_is_held_against_itself(runs: tuple[Path, list[tuple[int, str]]], tmp_path: Path) -> None:
    """Pipeline stages hold different parts, so the summary's numbers may belong to another rank."""
    folder = tmp_path / "run"
    shutil.copytree(runs[0] / "whole", folder)
    total = json.loads((folder / "prediction.json").read_text())["peak_allocated_bytes"]
    *before, last = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    summary = json.loads(last)
    furthest = {"predicted_allocated_bytes": 2**20, "measured_allocated_bytes": 2**21, "memory_rank": 1}
    by_rank = {"predicted_bytes_by_rank": [total, 2**20], "measured_bytes_by_rank": [total // 2, 2**21]}
    summary["memory"] |= {**furthest, **by_rank}
    (folder / "metrics.jsonl").write_text("".join([*before, json.dumps(summary) + "\n"]))
    page = unescape(report(folder))
    assert "which is 50.0% of it:" in page
    assert "<td>tensors of rank 1, the furthest from its prediction: predicted</td><td>1 MiB</td>" in page
