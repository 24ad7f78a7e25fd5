"""Texts that a shell, Slurm or a terminal would interpret reach only their destination, as data."""

from __future__ import annotations

import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from configs.load import load_config
from launch.jobs import plan_job
from slurm.agent import job_arguments
from slurm.arguments import Place
from slurm.options import check_options, sbatch_arguments
from slurm.submit import make_job
from tests.test_slurm_options import BASE, configured

HOSTILE = [
    "$(touch PWNED)", "`touch PWNED`", "x; touch PWNED", "a && touch PWNED", "\\'\"\ntouch PWNED #",
    "' || touch PWNED '",
    "\"; touch PWNED; \"", "$IFS", "-oProxyCommand=touch PWNED", "--wrap=touch PWNED", "../../x", "%j%A", "~root", "*",
    "a" * 5000, "\x07", "\x1b[31m", "\u202e", "{port}", "{a,b}", "|tee PWNED", "<(touch PWNED)", "x\ttouch", "--", "",
]  # fmt: skip
TEXTS = ["job_name", "account", "partition", "qos", "time", "gpu_type", "mem", "constraint", "dependency", "array",
         "container", "python"]  # fmt: skip


@pytest.mark.parametrize("key", TEXTS)
def test_hostile_options_are_refused_or_stay_one_word(key: str) -> None:
    config = configured()
    for text in HOSTILE:
        setattr(config.cluster.slurm, key, text)
        found = list(check_options(config))
        assert all("\n" not in line and line.isprintable() and len(line) < 400 for line in found)
        if not found and key not in ("python", "container"):
            words = sbatch_arguments(config, plan_job(config), output="log", array=None)
            assert not [word for word in words if text and text in word and not word.endswith(text)]
        if any(mark in text for mark in ("PWNED", "\x07", "\x1b")) and key not in ("python", "container"):
            assert found, f"{key}={text!r} was let through"


def test_hostile_texts_reach_the_ranks_word_for_word(tmp_path: Path) -> None:
    """They are data in job.json; the script, its arguments and sbatch's options do not contain them."""
    for number, text in enumerate(HOSTILE):
        run_dir = tmp_path / f"run{number}"
        words = [*BASE, "data=files", "data.paths=[corpus]", f"train.run_dir={run_dir}"]
        config = load_config(words)
        config.data.text_key = text
        job = make_job(config, plan_job(config), [*words, f"data.text_key={text}"], config_dir=None, run_dir=run_dir)
        assert f"data.text_key={text}" in job.words
        command = job_arguments(job, Place(nodes=2, node_rank=0, processes=4, address="n1", port=1))
        assert not [word for word in command if text and text in word and text != "--"]
    assert not list(tmp_path.glob("**/PWNED"))


def test_the_batch_script_is_fixed_and_keeps_words_whole(tmp_path: Path) -> None:
    """The real script runs with every kind of special character in the run folder's name."""
    run_dir = tmp_path / 'it\'s $(touch PWNED); `x` "y" *'
    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "slurm/setup.sh").write_text("export FROM_SETUP=1\n: $NEVER_SET\n")
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$FROM_SETUP" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(files("slurm") / "job.sbatch"), str(run_dir), str(python)],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["1", "-m", "slurm.supervise", str(run_dir)]
    assert not list(tmp_path.glob("**/PWNED"))
