"""Every command in README and docs runs, every link leads somewhere, every layout is in the README's table."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import newcomer
from tests.docs.chinese import is_chinese
from tests.support.warm import BIN, programs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY_POINT = re.compile(r"^(python -m [\w.]+|torchrun|memory-estimate|cookbook)\b", re.MULTILINE)
# These blocks start interpreters, so each entry point has run in one. The other blocks run in forks of a process that
# has already imported torch.
INTERPRETERS = (
    "python -m launch parallel=ddp data=synthetic data.seq_len=32",
    "torchrun ",
    "cookbook ",
    "memory-estimate -m ",
    'overrides="data=synthetic data.seq_len=32 train.global_batch_size=8 scheduler=constant"',
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def commands() -> list[tuple[str, str]]:
    """Returns (page, bash block) for all blocks. The lines of a block run in one shell, one after another."""
    found = []
    for page in PAGES:
        if is_chinese(page):  # its commands are those of the English page
            continue
        for block in BLOCK.findall(page.read_text()):
            found.append((page.name, block))
    return found


def test_the_pages_show_commands() -> None:
    assert len(commands()) >= 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "block"), commands(), ids=lambda value: shlex.quote(value)[:60])
def test_commands_run_as_printed(page: str, block: str, tmp_path: Path) -> None:
    """The commands run in a folder with the README and docs as in a checkout. Its runs/ is deleted with the test."""
    for name in ("README.md", "docs", "configs", "launch", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    own = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} if block.startswith(INTERPRETERS) else {}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=programs().environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **own),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, f"{page}:\n{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr


def test_each_entry_point_has_been_an_interpreter() -> None:
    blocks = [block for _, block in commands()]
    started = {name for block in blocks if block.startswith(INTERPRETERS) for name in ENTRY_POINT.findall(block)}
    assert started == {name for block in blocks for name in ENTRY_POINT.findall(block)}
    assert all(sum(block.startswith(head) for block in blocks) == 1 for head in INTERPRETERS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_every_layout_is_in_the_readme() -> None:
    files = {file.stem for file in (ROOT / "configs" / "parallel").glob("*.yaml")}
    table = (ROOT / "README.md").read_text().split("## Layouts")[1].split("\n## ")[0]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert files == set(re.findall(r"`(\w+)`", first_cells)) - {"parallel"}


def test_a_newcomer_finds_every_command_of_the_readme() -> None:
    """`python -m tests.newcomer` runs the two commands at the head, each block and each entry point, in order."""
    page = (ROOT / "README.md").read_text()
    found = list(newcomer.commands(page, tests=True))
    assert found[:2] == ["bash launch/demo.sh", newcomer.TESTS]
    assert [block.strip() for name, block in commands() if name == "README.md"] == [
        command for command in found[2:] if newcomer.OVERRIDES not in command
    ]
    started = [command.split()[0] for command in found if newcomer.OVERRIDES in command]
    assert started == ["python", "torchrun", "deepspeed", "accelerate", "python"]
    assert newcomer.TESTS not in newcomer.commands(page, tests=False)
