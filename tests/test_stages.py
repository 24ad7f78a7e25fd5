"""The page and the drawing of ZeRO's stages show the layouts' numbers, and a browser plays a step."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.docs import stages
from tests.docs.stage_step import SHOWN, highest, sent_bytes, step, waiting
from tests.support.browser import Page, browser

SMALL = ("0 2 4 1024", "1 4 4 1024", "2 8 8 1024", "3 16 4 4096", "FSDP 64 8 4096")


def test_pictures_of_stages_are_what_the_layouts_give() -> None:
    assert (stages.FOLDER / "zero-stages.svg").read_text() == stages.svg()  # tests.docs.stages
    text = (stages.FOLDER / "zero.html").read_text()
    assert all((stages.SOURCES / f"stages.{kind}").read_text() in text for kind in ("html", "css", "js"))
    cases = json.loads(text.partition('id="data">')[2].partition("</script>")[0])["cases"]
    assert len(cases) == len(stages.STAGES) * len(stages.RANKS) * len(stages.LAYERS) * len(stages.TOKENS)
    for chosen in SMALL:
        stage, *sizes = chosen.split()
        assert cases[chosen] == stages.case(stage, *map(int, sizes)), chosen  # tests.docs.stages


def test_stages_hold_and_send_what_the_chapter_says() -> None:
    """The values are those of docs/zero-and-fsdp.md for 8.03 x 10^9 parameters on 8 ranks, traffic in bytes per
    parameter."""
    parameters, head = 8_030_261_248, 128_256 * 4096
    laws = {"0": (29.92, 59.83, 4.0), "1": (14.96, 11.22, 6.0), "2": (14.96, 11.22, 6.0), "FSDP": (3.74, 7.48, 8.0)}
    # DeepSpeed keeps the head gathered between its forward and its backward.
    laws["3"] = (1.87, 11.22, 8 - 2 * head / parameters)
    for stage, (held_parameters, optimizer, sent) in laws.items():
        works = step(stage, 8, 32, 4096)
        held = dict(zip(SHOWN, highest(works), strict=True))
        found = [round(held[name] / 2**30, 2) for name in ("parameters", "optimizer")]
        assert found == [held_parameters, optimizer], stage
        assert sent_bytes(works) / parameters == pytest.approx(sent, rel=1e-4)
        for lane in (True, False):
            own = [work for work in works if work.computes is lane and work.kind != "D"]
            assert all(one.end <= other.begin + 1e-12 for one, other in pairwise(own))
    waits = {stage: waiting(step(stage, 8, 32, 4096)) for stage in laws}
    assert max(waits["0"], waits["3"], waits["FSDP"]) < min(waits["1"], waits["2"])  # nothing hides the latter


def text(page: Page, name: str) -> str:
    return page.run(f'document.getElementById("{name}").textContent')


def test_stages_move(tmp_path: Path) -> None:
    file = stages.FOLDER / "zero.html"
    with browser(tmp_path) as page:
        page.show(width=1280, height=1000)
        page.open(file)
        page.run('document.getElementById("stage").focus()')
        page.press("ArrowRight", 39)
        assert text(page, "stage said") == "stage 3"
        works = step("3", 8, 8, 4096)
        most = sum(highest(works)) / 2**30
        said = f"holds at most {most:.2f} of 79.1 GiB"
        assert text(page, "said").startswith(said) and f"waits {100 * waiting(works):.1f} %" in text(page, "said")
        drawn = sum(round(work.end / stages.TICK) > round(work.begin / stages.TICK) for work in works)
        assert page.run('document.querySelectorAll("#lanes rect:not(.track)").length') == drawn
        page.run('document.getElementById("on").click()')
        assert "gather parameters of layer 1" in text(page, "now")
        page.run('document.getElementById("play").click(); new Promise((done) => setTimeout(done, 200))')
        assert text(page, "play") == "Pause" and page.run("time") > 0
        page.run('document.getElementById("play").click()')
        assert text(page, "play") == "Play" and page.run('document.querySelectorAll("#cards figure").length') == 4
        page.show(width=360, height=740)
        assert page.complaints() == []
        assert page.wrong == [] and page.asked == [file.as_uri()]
