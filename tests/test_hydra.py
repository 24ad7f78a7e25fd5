"""docs/hydra.md: the config tree works in an ordinary Hydra app with sweepers, folders, `+`, `++` and `now`."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from cookbook import CookbookError, compose, from_hydra, predicted_speed
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from configs.errors import EXIT_STOPPED
from configs.load import from_yaml, load_config, to_yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hydra.md").read_text()
COMMANDS = re.findall(r"^```bash example\npython (.*?)\n```$", PAGE, re.MULTILINE)
GPUS = ("cluster=8xh100", "data.seq_len=256", "train.global_batch_size=256")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("configs", version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


def test_what_hydra_composes_is_what_our_loader_composes() -> None:
    words = ["experiment=demo", "parallel=zero2", "++train.steps=7", "++model.config.num_hidden_layers=2"]
    # `note` is a key of the application, and one of our keys refers to it.
    own = ["+note=first", "logging.run_name=${note}"]
    theirs = from_hydra(composed(*words, "+model.config.num_attention_heads=2", *own))
    ours = load_config([*words, "+model.config.num_attention_heads=2", "logging.run_name=first"])
    assert to_yaml(theirs) == to_yaml(ours) and (ours.train.steps, len(ours.model.config)) == (7, 2)


def test_a_primary_config_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, {override parallel: fsdp}, _self_]\nhydra: {searchpath: ['pkg://configs']}\n"
        "train: {steps: 9}\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = from_hydra(hydra_compose("mine", overrides=["+optimizer.options.x=1"]))
    assert (config.train.steps, config.parallel.preset, config.optimizer.options) == (9, "fsdp", {"x": 1})


def test_mistakes_are_lines() -> None:
    with pytest.raises(CookbookError) as raised:
        from_hydra(composed("train.steps=-1", "optimizer.lr=-3"))
    assert [problem.partition(":")[0] for problem in raised.value.problems] == ["optimizer.lr=-3.0", "train.steps=-1"]


def test_the_clock_is_read_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = composed("train.run_dir=runs/${now:%f}", "logging.run_name=${train.run_dir}")
    config = from_hydra(timed)
    assert config.train.run_dir == config.logging.run_name and config.train.run_dir != "runs/${now:%f}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CookbookError) as raised:
        from_hydra(composed("train.run_dir=runs/${now:%H}"))
    assert raised.value.problems[0] in PAGE


def test_the_planners_speed() -> None:
    fits, tight = (predicted_speed(compose(*GPUS, "parallel=fsdp", f"train.micro_batch_size={n}")) for n in (8, 32))
    assert fits > 0 and tight > 0
    assert predicted_speed(compose(*GPUS, "parallel=tensor", "cluster.gpus_per_node=8")) == 0.0  # 2 key-value heads
    assert predicted_speed(compose("model=llama3_1_70b", "cluster=8xh100", "parallel=ddp")) == 0.0
    with pytest.raises(CookbookError, match="predicted_speed: plans for GPUs; name them"):
        predicted_speed(compose("cluster=cpu", "parallel=ddp"))


def test_the_script_trains_with_folders_and_experiments_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script, conf = ROOT / "launch/examples/sweep.py", ROOT / "launch/examples/conf"
    words = ["--config-dir", str(conf), "experiment=short", "++logging.progress=off", "+model.config.hidden_size=32"]
    monkeypatch.setattr(sys, "argv", [str(script), *words, "hydra/hydra_logging=none"])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    runpy.run_path(str(script), run_name="__main__")
    (folder,) = (tmp_path / "runs").iterdir()
    config = from_yaml((folder / "config.yaml").read_text())
    assert (config.train.steps, config.data.seq_len, config.model.config) == (2, 32, {"hidden_size": 32})
    assert (folder / "summary.json").exists() and folder.name == Path(str(config.train.run_dir)).name


def test_the_page_shows_the_script() -> None:
    shown = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    assert shown in (ROOT / "launch/examples/sweep.py").read_text()


def test_a_trial_that_is_stopped_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C asks the run to stop, so the run has no final validation loss."""
    monkeypatch.chdir(tmp_path)
    script = ROOT / "launch/examples/sweep.py"
    words = ["--config-dir", str(ROOT / "launch/examples/conf"), "experiment=short", "++logging.progress=off"]
    words += ["+model.config.hidden_size=32", "train.steps=9", "train.callbacks=[tests.test_python.Stops]"]
    monkeypatch.setattr(sys, "argv", [str(script), *words, "hydra/hydra_logging=none"])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == EXIT_STOPPED


@pytest.mark.nightly  # starts three interpreters
@pytest.mark.skipif(find_spec("hydra_plugins") is None, reason="no hydra-optuna-sweeper")
def test_the_sweeps_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/launch/python", "OMP_NUM_THREADS": "1"}
    for number, command in enumerate(COMMANDS):
        words = [sys.executable, *shlex.split(command)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
        assert (best["best_value"] > 1000) is (number == 1), best
    objective = re.findall(r"^```python\n(import optuna.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", objective], env=environment, capture_output=True, text=True, timeout=280
    )
    assert "layout" in done.stdout, done.stderr[-3000:]
    # Each trial has its own folder because each trial reads the clock.
    assert len(list((tmp_path / "runs").iterdir())) == 2
