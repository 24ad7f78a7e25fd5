"""Everything that the machine lacks is reported before anything is built, in one line each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import EnvironmentProblem
from configs.load import load_config
from tests.support.deepspeed_cases import problems_of_machine, problems_without_float16
from tests.support.harness import run_ranks
from trainer.engine.deepspeed import preflight
from trainer.engine.deepspeed.setup import LOWEST_VERSION
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

ROOT = Path(__file__).parent.parent
NOTHING = {"PATH": "/nonexistent", "CXX": "c++"}
NO_LIBAIO = {"CFLAGS": "-include /nonexistent/libaio.h"}


def problems(*overrides: str, environment: dict[str, str] | None = None) -> list[str]:
    return run_ranks(1, problems_of_machine, list(overrides), environment or {})[0]


@pytest.mark.parametrize("layout", ["zero1", "zero2_offload", "zero3_offload"])
def test_layouts_without_kernels_need_no_compiler(layout: str) -> None:
    assert problems(f"parallel={layout}", environment=NOTHING) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing", r"^parallel\.offload\.nvme_path=\S+/missing: no such folder; create it on a local NVMe disk"),
        ("file", r"^parallel\.offload\.nvme_path=\S+/file: is not a folder; give a folder"),
    ],
)
def test_swap_folder(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = problems("parallel=zero3_nvme", f"parallel.offload.nvme_path={tmp_path / name}")
    assert len([line for line in found if re.search(expected, line)]) == 1, found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_swap_folder_that_takes_no_files() -> None:
    found = problems("parallel=zero3_nvme", "parallel.offload.nvme_path=/proc")
    expected = r"^parallel\.offload\.nvme_path=/proc: no file for direct IO can be made there \(.+\); give a writable"
    assert len([line for line in found if re.search(expected, line)]) == 1, found


def test_missing_build_tools_are_named(tmp_path: Path) -> None:
    keys = ("parallel=zero3_nvme", "parallel.offload.parameters=none", f"parallel.offload.nvme_path={tmp_path}")
    found = problems(*keys, environment=NOTHING)
    assert found[0] == (
        "parallel.offload.optimizer=nvme: DeepSpeed's async_io kernel is compiled at first use, which needs a C++"
        " compiler (apt-get install g++)"
    )
    found = problems("parallel=zero1_offload", "optimizer.implementation=deepspeed_cpu", environment=NOTHING)
    assert found[0].startswith("optimizer.implementation=deepspeed_cpu: DeepSpeed's cpu_adam kernel is compiled")


def test_missing_libaio_is_named(tmp_path: Path) -> None:
    found = problems("parallel=zero3_nvme", f"parallel.offload.nvme_path={tmp_path}", environment=NO_LIBAIO)
    assert found[-1].endswith("which needs libaio's headers (apt-get install libaio-dev)")


def test_ninja_is_found_beside_the_interpreter() -> None:
    """The environment need not be activated: ninja is in the folder of its Python interpreter."""
    bare = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "ninja").exists())
    found = problems("parallel=zero1_offload", "optimizer.implementation=deepspeed_cpu", environment={"PATH": bare})
    assert not [line for line in found if "ninja" in line]


def test_float16_where_the_device_has_none() -> None:
    assert run_ranks(1, problems_without_float16, ["parallel=zero2", "precision=fp16"])[0] == [
        "precision.param_dtype=float16: DeepSpeed does not support it on this cpu; use precision=fp32, or parallel=ddp"
    ]


@pytest.mark.parametrize("installed", ["0.18.0", "0.19.7", None])
def test_deepspeed_is_recent_enough(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "installed", lambda _: installed)
    config = load_config(["parallel=zero1"])
    with pytest.raises(EnvironmentProblem) as caught:
        preflight.check_deepspeed(config, make_plan(config, Machine()))
    (line,) = caught.value.problems
    assert line.startswith("parallel.engine=deepspeed: ")
    assert f"pip install 'deepspeed>={LOWEST_VERSION},<0.20'" in line
    assert (installed or "not installed") in line


def test_the_lowest_version_is_the_one_that_is_required() -> None:
    assert f'"deepspeed>={LOWEST_VERSION},<0.20"' in (ROOT / "pyproject.toml").read_text()


def test_the_entry_point_turns_away_without_a_traceback(tmp_path: Path) -> None:
    words = [
        "parallel=zero3_nvme",
        f"parallel.offload.nvme_path={tmp_path / 'missing'}",
        f"train.run_dir={tmp_path}/run",
    ]
    command = [sys.executable, "-m", "trainer", "cluster.device=cpu", "parallel.dp_shard=1", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2
    assert f"parallel.offload.nvme_path={tmp_path / 'missing'}: no such folder" in ended.stderr
    assert "Traceback" not in ended.stderr
