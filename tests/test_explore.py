"""The page of `estimate.explore` shows the numbers of memory-estimate, and it is usable in a browser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import launch.__main__
from launch.estimate import main
from tests.docs import schedules
from tests.support.browser import Page, browser
from trainer.axes.pipeline.table import SCHEDULES, check_pipeline
from trainer.axes.pipeline.timeline import bubble_fraction
from trainer.estimate.render import LABELS

WORDS = ["model=tiny", "cluster=8xl4", "cluster.gpus_per_node=1", "precision=bf16", "data.seq_len=128"]
WORDS += ["train.global_batch_size=64", "cluster.gpu_memory_gib=0.055"]
# Without the CUDA context, the size of this small model decides which combinations fit. Some do not.
ASSUMED = ["estimate.context_gib=0"]
TOTALS = ("peak allocated", "peak reserved by torch", "CUDA context, NCCL (assumed)", "on the device (nvidia-smi)")
# Options to choose on the page: preset, micro-batch size, recompute, optimizer.
CHOICES = [("single", "8", "none", "adamw"), ("zero1", "1", "full", "sgd"), ("zero3_offload", "2", "full", "adamw")]
REFUSED = ("zero3", "1", "selective", "sgd")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    file = tmp_path_factory.mktemp("explore") / "page.html"
    assert main(["-m", *WORDS, *ASSUMED, "optimizer=adamw,sgd", cache, f"estimate.explore={file}"]) == 0
    return file


@pytest.fixture(scope="module")
def page(written: Path, tmp_path_factory: pytest.TempPathFactory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        opened.show(width=1280, height=1000)
        opened.open(written)
        yield opened


def choose(page: Page, preset: str, size: str, recompute: str, optimizer: str) -> None:
    page.run(
        f"""(() => {{
        const preset = document.getElementById("preset");
        preset.value = "{preset}";
        preset.dispatchEvent(new Event("change"));
        for (const text of {[size, recompute, optimizer]})
          [...document.querySelectorAll(".options label")].find((label) => label.textContent === text).click();
        }})()"""
    )


def shown(page: Page) -> dict[str, str]:
    """Returns the rows of the table as label -> value."""
    cells = page.run(
        '[...document.querySelectorAll("#parts tr")].map((row) => [...row.cells].map((c) => c.textContent))'
    )
    return {label: value for label, value in cells}


def text(page: Page, name: str) -> str:
    return page.run(f'document.getElementById("{name}").textContent')


def words_of(command: str) -> list[str]:
    program, *words = re.split(r"^python -m launch ", command)
    assert not program and len(words) == 1
    return shlex.split(words[0])


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda chosen: chosen[0])
def test_the_page_shows_what_memory_estimate_prints(
    chosen: tuple[str, str, str, str], page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    choose(page, *chosen)
    words = words_of(text(page, "command"))
    preset, size, recompute, optimizer = chosen
    assert {f"parallel={preset}", f"train.micro_batch_size={size}", f"optimizer={optimizer}"} <= {*words}
    assert f"train.activation_checkpointing={recompute}" in words
    main([*words, *ASSUMED, "estimate.suggest=false"])
    printed = capsys.readouterr().out
    place = _busiest(printed)
    rows = {label: _values(printed, label)[place] for label in (*LABELS.values(), *TOTALS)}
    assert {label: shown(page)[label] for label in rows} == rows
    verdict = text(page, "verdict").partition(":")[0]
    assert f"\n{verdict}: " in printed
    assert launch.__main__.main([*words, "dry_run=true", "estimate.gate=off"]) == 0


def _busiest(printed: str) -> int:
    """Returns the column of the rank that needs the most memory."""
    titles = next(line for line in printed.splitlines() if line.startswith("GiB per GPU"))
    kinds = re.split(r"\s{2,}", titles)[1:]
    return next((place for place, kind in enumerate(kinds) if "(busiest)" in kind), 0)


def _values(printed: str, label: str) -> list[str]:
    line = next(line for line in printed.splitlines() if line.startswith(label))
    return re.split(r"\s{2,}", line.removeprefix(label).strip())


def test_a_refused_combination_shows_the_rule(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    choose(page, *REFUSED)
    assert text(page, "verdict") == "refused by the rules"
    assert main([*words_of(text(page, "command"))]) == 2
    said = capsys.readouterr().err
    lines = page.run('[...document.querySelectorAll("#refused li")].map((line) => line.textContent)')
    assert lines and all(line in said for line in lines)
    assert not page.run('[...document.querySelectorAll("#parts tr")].length')


def test_keyboard_phone_and_link(page: Page, tmp_path: Path) -> None:
    choose(page, *CHOICES[0])
    page.run("""document.querySelector('input[name="size"]:checked').focus()""")
    page.press("ArrowLeft", 37)
    assert "train.micro_batch_size=4" in text(page, "command")
    link = page.run("location.hash")
    page.run('document.getElementById("best").click()')
    assert page.run('document.getElementById("verdict").className') == "good"
    page.run(f'location.hash = "{link}"; new Promise((done) => setTimeout(done, 50))')
    assert "train.micro_batch_size=4" in text(page, "command")
    for width, dark in ((360, False), (360, True), (1280, True)):
        page.show(width=width, height=1000, dark=dark)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.complaints() == []
        page.picture(tmp_path / f"{width}-{dark}.png")
    assert page.run("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    page.show(width=1280, height=1000)


def test_the_page_asks_for_nothing_and_complains_of_nothing(page: Page, written: Path) -> None:
    page.run("1")
    assert page.wrong == []
    assert page.asked == [written.as_uri()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["estimate.explore=page.txt"], "estimate.explore=page.txt: writes .html"),
        (["estimate.explore=nowhere/page.html"], "there is no folder nowhere"),
        (["estimate.explore=page.html", "train.micro_batch_size=1"], "train.micro_batch_size"),
        (
            ["estimate.explore=page.html", "estimate.search=true"],
            "estimate.search: estimate.explore writes its page alone",
        ),
        (["-m", "estimate.explore=page.html", "parallel=ddp,fsdp"], "parallel: estimate.explore has no control for it"),
        (["estimate.explore=page.html", "cluster.device=cpu"], "cluster=8xh100"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_it_cannot_do_is_refused_at_once(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "model=tiny"]) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_pictures_of_schedules_are_what_the_orders_give() -> None:
    made = schedules.made()
    assert [name for name in made if (schedules.FOLDER / name).read_text() != made[name]] == []  # tests.docs.schedules


def test_schedules_move(page: Page, written: Path) -> None:
    page.open(schedules.FOLDER / "schedules.html")
    assert (
        text(page, "said") == f"the ranks wait {100 * bubble_fraction('1f1b', pp=4, micro_batches=8):.1f} % of the step"
    )
    page.run('document.getElementById("ranks").focus()')
    page.press("ArrowRight", 39)
    assert (
        text(page, "said") == f"the ranks wait {100 * bubble_fraction('1f1b', pp=6, micro_batches=8):.1f} % of the step"
    )
    assert page.run('document.querySelectorAll("#picture rect:not(.wait)").length') == 6 * 8 * 2
    for name in SCHEDULES:
        page.run(f'''{{const s = document.getElementById("schedule"); s.value = "{name}";
                 s.dispatchEvent(new Event("change"))}}''')
        refused = [*check_pipeline(pp=6, schedule=name, micro_batches=8)]
        assert text(page, "said").startswith(f"refused: {refused[0]}" if refused else "the ranks wait"), name
    page.show(width=360, height=740)
    assert page.complaints() == []
    page.show(width=1280, height=1000)
    assert page.wrong == [] and set(page.asked) == {written.as_uri(), (schedules.FOLDER / "schedules.html").as_uri()}
