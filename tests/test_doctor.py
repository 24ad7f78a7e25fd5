"""`cookbook doctor` examines this machine, and `cookbook completion` works in the installed shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from configs.load import group_options
from launch.cookbook import main as cookbook
from launch.doctor import machine as examined
from launch.doctor.fact import Fact
from launch.doctor.software import required
from trainer.plan.machine import Machine

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    """Returns the exit code and the first line about each item, by its name. A line with `!` reports a problem."""
    code = cookbook(["doctor", *words])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(":")]
    said: dict[str, str] = {}
    for line in lines:
        said.setdefault(line[2:].split()[0], line[0] + line[22:].strip())
    return code, said


def test_every_layout_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, said = doctor(capsys, "cluster.device=cpu", f"train.run_dir={tmp_path}/a/b")
    assert code == 0  # the layouts that cannot run were not requested
    assert group_options()["parallel"] == [name for name in said if name in group_options()["parallel"]]
    assert said["tensor"] == " can run: 2 process(es) on cpu, tp 2"
    assert said["expert"].startswith("!parallel.ep=null: llama has no experts")
    assert said["zero3_nvme"].startswith("!parallel.offload.nvme_path=null: ")
    # The disk is that of the nearest existing folder, and no file is left in it.
    assert re.fullmatch(rf" {tmp_path} has [\d.]+ GiB free, writes [\d.]+ GB/s", said["disk"])
    assert list(tmp_path.iterdir()) == []
    assert said["python"].endswith(sys.executable)
    assert said["cluster"] == " none runs here; cluster=ray starts one for its run"


def test_the_folder_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["cluster.device=cpu", "parallel=single", "train.run_dir='~/${now:%Y}'"]
    assert doctor(capsys, *words)[1]["disk"].startswith(f" {tmp_path} has ")
    assert cookbook(["estimate", "--cfg", "job", *words]) == 0
    assert re.search(r"run_dir: ~/\d{4}$", capsys.readouterr().out, re.MULTILINE)


def test_a_layout_that_is_named_decides_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster.device=cpu", "parallel=zero3_nvme", f"train.run_dir={tmp_path}"]
    code, said = doctor(capsys, *words, f"parallel.offload.nvme_path={tmp_path}/none")
    assert code == 2
    assert said["zero3_nvme"] == (
        f"!parallel.offload.nvme_path={tmp_path}/none: no such folder; create it on a local NVMe disk of every node"
    )
    code, said = doctor(capsys, "cluster.device=cpu", "parallel=fsdp", f"train.run_dir={tmp_path}")
    assert (code, said["fsdp"]) == (0, " can run: 2 process(es) on cpu, dp_shard 2")
    assert "ddp" not in said


def test_what_is_missing_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The driver shows GPUs, but the installed torch cannot use them.
    monkeypatch.setattr(examined, "find_machine", lambda: Machine(gpus=2))
    monkeypatch.setattr(examined.torch.version, "cuda", None)
    monkeypatch.setattr(examined.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    bad = {fact.name: fact.text for fact in examined.machine(tmp_path) if not fact.well}
    assert bad["gpu"].startswith("the driver shows 2, but torch ")
    assert bad["compiler"].startswith("missing: C++; train.compile=true and DeepSpeed's kernels")


def test_a_version_that_was_never_tested_is_said() -> None:
    found = required(Requirement("numpy<1"))
    assert not found.well and re.fullmatch(r"[\d.]+ is outside of <1; pip install 'numpy<1'", found.text)
    assert required(Requirement("no-such-package>=2")) == Fact(
        "no-such-package", "not installed; pip install 'no-such-package>=2'", well=False
    )


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("cookbook comp", ["compare", "completion"]),
        ("cookbook train parallel=f", ["parallel=fsdp", "parallel=fsdp_offload"]),
        ("cookbook launch parallel=ddp,fs", ["parallel=ddp,fsdp", "parallel=ddp,fsdp_offload"]),
        ("cookbook launch -m +experiment=de", ["+experiment=demo"]),
        ("cookbook train parallel.off", ["parallel.offload."]),
        ("cookbook train parallel.offload.", [f"parallel.offload.{key}=" for key in ("nvme_path", "optimizer")]),
        ("memory-estimate train.compile=", ["train.compile=false", "train.compile=true"]),
        ("cookbook train scheduler.name=const", ["scheduler.name=constant"]),
        ("cookbook estimate --ver", ["--version"]),
        ("cookbook train model.path=", []),  # the shell offers files
        ("cookbook status ru", []),
        ("cookbook train --config-dir ", []),
    ],
)
def test_completion(line: str, candidates: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cookbook(["completion", "answer", line]) == 0
    answered = capsys.readouterr().out.split()
    assert [word for word in answered if word in candidates] == candidates
    assert candidates or not answered


def test_a_folder_of_own_options_is_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("preset: mine\n")
    assert cookbook(["completion", "answer", f"cookbook train --config-dir {tmp_path} model=min"]) == 0
    assert capsys.readouterr().out.split() == ["model=mine"]


BASH = """
source <(cookbook completion bash)
compopt() { :; }  # no line is being edited
for COMP_LINE in "cookbook train parallel=fsdp_" "cookbook doc"; do
    COMP_POINT=${#COMP_LINE}; _cookbook; echo "$COMPREPLY"
done
"""
FISH = """
cookbook completion fish | source
complete -C "cookbook train parallel=fsdp_"
complete -C "cookbook doc"
"""


@pytest.mark.parametrize(("shell", "script"), [("bash", BASH), ("fish", FISH)])
def test_completion_in_a_shell(shell: str, script: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    first, second = done.stdout.split()
    # Bash replaces the text after the "=", and fish replaces the whole word.
    assert (first.removeprefix("parallel="), second) == ("fsdp_offload", "doctor"), done


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_completion_in_zsh() -> None:
    """Zsh completes only in an interactive shell, so it gets its own terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe("zsh", ["zsh", "-f"], ENVIRONMENT)
    setup = b"autoload -U compinit; compinit -u -D; source <(cookbook completion zsh); echo rea''dy\n"
    try:
        os.write(terminal, setup)
        assert b"ready" in _heard(terminal, b"ready")
        os.write(terminal, b"cookbook train parallel=fsdp_\t")
        assert b"fsdp_offload" in _heard(terminal, b"offload")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def _heard(terminal: int, wanted: bytes) -> bytes:
    heard, deadline = b"", time.monotonic() + 60
    while wanted not in heard and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            heard += os.read(terminal, 65536)
    return heard


def test_the_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cookbook(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "cookbook completion tcsh: name a shell; choose bash, zsh, fish\n"
