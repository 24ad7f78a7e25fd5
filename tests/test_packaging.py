"""The wheel holds every YAML and works from any folder. Pins and ranges agree. Setup runs only once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
INSTALLED = {canonicalize_name(one.name) for one in distributions()}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy of the tracked and untracked files, so the build leaves nothing in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for file in files:
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    done = run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, ".", cwd=source
    )
    assert done.returncode == 0, done.stderr
    return next(target.glob("*.whl"))


def test_every_pin_installs_on_the_first_release_of_the_oldest_python() -> None:
    """Debian 12 has Python 3.11.2, where a package that requires 3.11.5 makes the whole set uninstallable."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    asked = {name: distribution(name).metadata["Requires-Python"] for name in PINS if name in INSTALLED}
    assert len(asked) > 100
    assert not {name: needed for name, needed in asked.items() if needed and oldest not in SpecifierSet(needed)}


def test_the_wheel_holds_every_yaml_and_module_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    yamls = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    modules = {
        str(file.relative_to(ROOT)).removeprefix("launch/python/")
        for package in ("configs", "trainer", "launch", "slurm")
        for file in (ROOT / package).rglob("*.py")
    }
    scripts = {str(file.relative_to(ROOT)) for file in (ROOT / "slurm").glob("*.sbatch")}
    assert len(scripts) >= 1
    assert len(yamls) >= 74
    assert len(modules) >= 80
    assert yamls | modules | scripts <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} <= {
        "configs",
        "trainer",
        "launch",
        "slurm",
        "cookbook",
    }


def test_the_installed_package_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    made = run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    python = tmp_path / "env/bin/python"
    # This makes the test environment's libraries available, without its editable install of the project.
    libraries = next((tmp_path / "env").glob("lib/python*/site-packages")) / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib") + "\n")
    install = ("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--force-reinstall", wheel)
    done = run(sys.executable, *install, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    (tmp_path / "elsewhere").mkdir()
    where = run(python, "-c", "import configs; print(configs.__file__)", cwd=tmp_path / "elsewhere", PYTHONPATH="")
    assert where.stdout.startswith(str(tmp_path / "env"))
    for words in (["-m", "trainer", "--cfg", "job"], ["-m", "launch", "experiment=demo", "dry_run=true"]):
        done = run(python, *words, cwd=tmp_path / "elsewhere", PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        assert "float32" in done.stdout


def test_every_pin_lies_in_its_range() -> None:
    wanted = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
    assert len(wanted) >= 20
    assert not [str(line) for line in wanted if not line.specifier.contains(pins[line.name.lower()])]


def test_every_library_has_a_lowest_version() -> None:
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    assert not [str(line) for line in wanted if not any(part.operator == ">=" for part in line.specifier)]


def source_setup(command: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a function of setup.sh in a copy of the project's files that decide the installation."""
    (tmp_path / "launch").mkdir()
    for file in ("launch/setup.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    return run("bash", "-euc", f"source launch/setup.sh; {command}", cwd=tmp_path, **environment)


def fake_python(folder: Path, body: str) -> str:
    """Returns a PATH with the usual tools, whose only Python is the given shell script."""
    folder.mkdir()
    for name in ("python3", "python"):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    for tool in ("bash", "cat", "cut", "dirname", "sha256sum", "uname"):
        (folder / tool).symlink_to(next(p for p in ("/usr/bin", "/bin") if Path(p, tool).exists()) + f"/{tool}")
    return str(folder)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('case "$*" in *version_info*) exit 1;; --version) echo Python 3.9.2;; esac', "python is Python 3.9.2"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "cannot make virtual environments (Debian, Ubuntu: apt install"),
        ("exit 127", "none was found on PATH"),
    ],
)
def test_a_machine_without_a_fit_python_says_what_to_do(body: str, reason: str, tmp_path: Path) -> None:
    done = source_setup("setup_environment", tmp_path, PATH=fake_python(tmp_path / "bin", body), PYTHON="")
    assert done.returncode != 0
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_set_up_does_nothing_the_second_time(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    key = 'key=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16); touch ".venv/.installed-$key-dev"'
    nothing = fake_python(tmp_path / "bin", "exit 127")
    done = source_setup(
        f"{key}; setup_environment dev; setup_environment; echo done", tmp_path, PATH=nothing + ":/usr/bin"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_image_is_made_of_what_there_is() -> None:
    text = (ROOT / "launch/kubernetes/Dockerfile").read_text()
    offered = re.findall(r"(\w+) \(", re.findall(r"^# EXTRAS.*$", text, re.MULTILINE)[0])
    assert {*offered, "dev"} == {*PROJECT["optional-dependencies"]}
    assert re.findall(r"^ARG EXTRAS=(\w+)$", text, re.MULTILINE)[0] in offered
    copied = [word for words in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in words.split()[:-1]]
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied.pop() == "." and {word.partition("/")[0] for word in copied} == seen
    assert all((ROOT / word).is_file() for word in copied), copied


def test_the_release_names_one_version() -> None:
    version = re.escape(PROJECT["version"])
    citation = (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "docs" / "changelog.md").read_text()
    assert re.search(f"^version: {version}$", citation, re.MULTILINE)
    released = re.findall(rf"^## {version} \((.+)\)$", changelog, re.MULTILINE)
    assert re.findall(r'^date-released: "(.+)"$', citation, re.MULTILINE) == released
    changes = re.findall(r"^## (\S+)", changelog, re.MULTILINE)
    assert changes[0] == "Unreleased" or changes[0] == PROJECT["version"]
