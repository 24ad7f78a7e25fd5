"""Values are used as typed: ranges, text that looks like numbers, the environment, the clock, YAML of users."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest

from configs import foreign
from configs.foreign import Fate
from configs.keys import plain_kind, schema_keys
from configs.load import expand_sweep, from_yaml, group_options, load_config, to_yaml
from configs.overrides import check_overrides
from configs.ranges import RANGES, check_ranges
from configs.schema import Config
from launch.__main__ import main as launch
from launch.estimate import main as memory_estimate
from trainer.__main__ import main as trainer

ENTRY_POINTS = {"launch": launch, "trainer": trainer, "memory-estimate": memory_estimate}
NUMBERS = [
    key
    for key in schema_keys()
    if get_origin(plain_kind(key)) is not dict and {int, float} & {plain_kind(key), *get_args(plain_kind(key))}
]


def refused(capsys: pytest.CaptureFixture[str], entry_point: str, *words: str) -> list[str]:
    """Returns the lines of an entry point that refuses the overrides before it does anything."""
    assert ENTRY_POINTS[entry_point](words) == 2
    said = capsys.readouterr()
    assert not said.out
    lines = said.err.splitlines()
    assert lines and not any("Traceback" in line for line in lines)
    return lines


def test_every_number_of_the_schema_has_a_range_that_holds_its_default() -> None:
    assert set(NUMBERS) == set(RANGES)
    assert list(check_ranges(Config())) == []


def test_no_number_is_infinite_or_none_at_all() -> None:
    """Each key alone refuses NaN, infinity, a huge number, and -1."""
    for key in NUMBERS:
        for number in (float("nan"), float("inf"), 10**30 if plain_kind(key) is int else 1e39, -1):
            assert not RANGES[key].holds(number), (key, number)
            assert RANGES[key].rule(number).startswith("must be ")


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_all_numbers_are_held_against_their_ranges_before_any_is_used(
    entry_point: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "parallel.tp=0": "must be 1 or more",
        "optimizer.lr=nan": "must be greater than 0",
        "train.seed=9223372036854775808": "must be 9,223,372,036,854,775,807 or less",
        "train.timeout_minutes=inf": "must be 100,000 or less",
        "cluster.nodes=0": "must be 1 or more",
        "cluster.gpus_per_node=1000000": "must be 1,024 or less",
        "data.num_workers=129": "must be 128 or less",
        "estimate.efficiency=0.0": "must be greater than 0 and 1 or less",
        "profile_steps=[1, 0]": "each must be 1 or more",
    }
    lines = refused(capsys, entry_point, *wrong, "estimate.search=true")
    assert sorted(lines) == sorted(f"{word}: {rule}" for word, rule in wrong.items())


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("train.run_dir=", "train.run_dir=: must not be empty; null leaves it out"),
        ("data.text_key=' '", "data.text_key=' ': must not be empty"),
        ("train.run_dir=/", "train.run_dir=/: is the root; a run needs a folder of its own"),
        ("train.run_dir='~'", "train.run_dir=~: is the home folder; a run needs a folder of its own"),
        ("train.run_dir=runs/..", "train.run_dir=runs/..: is the current folder; a run needs a folder of its own"),
        (
            f"train.run_dir=runs/{'x' * 256}",
            f"train.run_dir=runs/{'x' * 256}: is too long; 255 bytes between two slashes",
        ),
        ("train.compile=2", "train.compile=2: must be true or false"),
        ("train.compile=yes", "train.compile=yes: must be true or false"),
        ("train.steps=5.0", "train.steps=5.0: must be a whole number"),
        ("train.steps=???", "train.steps=???: is OmegaConf's mark of a missing value; must be a whole number"),
        ("profile_steps=[1,a]", "profile_steps=[1,a]: must be a list of whole numbers: [1,2]"),
        ("data.paths=[1e5]", "data.paths=[1e5]: each must be a text; put quotes around what reads as a number"),
        (
            "optimizer.lr=${oc.env:NOT_SET}",
            "optimizer.lr=${oc.env:NOT_SET}: the environment variable NOT_SET is not set",
        ),
        ("train.compile=${oc.env:TWO}", "train.compile=2: must be true or false"),
        ("train.steps=${train.step}", "train.steps=${train.step}: there is no key train.step; write the whole key"),
        ("train.steps=${train.steps}", "train.steps=${train.steps}: refers to itself; give a value"),
        ("train.steps=${nope:1}", "train.steps=${nope:1}: there is no such resolver; use ${oc.env:NAME}"),
        ("optimizer.lr=interval(1,2)", "optimizer.lr=interval(1,2): an interval needs a sweeper that searches it"),
        (
            "launcher.args=['--nproc_per_node=9']",
            "launcher.args=[--nproc_per_node=9]: the plan decides it, and ranks started otherwise would refuse; set",
        ),
        ("launcher.args=['--rdzv-backend=c10d']", "launcher.args=[--rdzv-backend=c10d]: the plan decides it"),
        (
            "model.architecture={a: 1}",
            "model.architecture={a: 1}: these are the preset's published dimensions; set mod",
        ),
        ("train.learning_rate=1", "train.learning_rate=1: no such key; here it is optimizer.lr"),
        ("zero_optimization.stage=2", "zero_optimization.stage=2: no such key; here it is parallel.zero_stage"),
        ("num_train_epochs=3", "num_train_epochs=3: no such key; here it is train.epochs (samples run on from one"),
        ("--learning-rate=1", "--learning-rate=1: no such flag; here it is optimizer.lr, without dashes"),
        ("train.cheese=1", "train.cheese=1: no such key; train has steps, "),
        ("a\nb=1", "a\\nb=1: no such key; the sections are "),
        (
            "cluster.gpus_per_node=1000",
            "cluster.gpus_per_node=1000: each is a process of its own, and this machine has",
        ),
    ],
)
def test_a_wrong_value_is_one_line(
    word: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWO", "2")
    found = refused(capsys, "launch", "parallel=ddp", "cluster=cpu", word, "dry_run=true")
    assert len(found) == 1 and found[0].startswith(line), found


def test_a_sweep_names_what_an_interval_needs(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refused(capsys, "launch", "-m", "optimizer.lr=interval(1e-4,1e-3)")
    assert "list them, optimizer.lr=1,2,3" in line


TEXTS = {
    "cluster.slurm.time": "12:00:00",
    "cluster.slurm.account": "0123",
    "cluster.slurm.partition": "1e5",
    "cluster.slurm.job_name": "on",
    "cluster.slurm.mem": "1_000",
    "cluster.slurm.constraint": "True",
    "cluster.slurm.qos": "0x1F",
    "train.run_dir": "2026-01-02",
    "logging.run_name": "1.10",
    "data.subset": "nan",
}


def test_a_text_keeps_its_characters_wherever_it_is_typed(tmp_path: Path) -> None:
    typed = load_config([f"{key}={text}" for key, text in TEXTS.items()])
    lines = [f"{key.split('.')[-1]}: {text}" for key, text in TEXTS.items()]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/mine.yaml").write_text("slurm:\n" + "".join(f"  {line}\n" for line in lines[:7]))
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /cluster: mine\n"
        f"train: {{{lines[7]}}}\nlogging: {{{lines[8]}}}\ndata: {{{lines[9]}, paths: [0123, 1e5, no]}}\n"
    )
    read = load_config(["experiment=mine"], config_dir=str(tmp_path))
    for config in (typed, read, from_yaml(to_yaml(read))):
        values = {key: getattr(config.cluster.slurm, key.split(".")[-1], None) for key in TEXTS}
        values |= {"train.run_dir": config.train.run_dir, "logging.run_name": config.logging.run_name}
        assert {**values, "data.subset": config.data.subset} == TEXTS
    assert read.data.paths == ["0123", "1e5", "no"]
    assert typed == load_config([f"{key}='{text}'" for key, text in TEXTS.items()])
    assert expand_sweep(["data.subset=1e5,0123"]) == [["data.subset=1e5"], ["data.subset=0123"]]


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize(
    ("name", "body", "problem"),
    [
        ("train/mine", "steps: 3", "train=mine: is a section; set one of train.steps, "),
        (
            "cluster/mine",
            "slurm: {time: 0:30, cpus_per_node: 1:30}",
            "cluster.slurm.cpus_per_node=1:30: must be a whole",
        ),
        ("launcher/mine", "preflight: on", "launcher.preflight=on: must be true or false or null"),
        (
            "model/mine",
            "config: {use_cache: no}",
            "model.config.use_cache=no: versions of YAML read this differently; put",
        ),
        ("logging/mine", "run_name: ${now:%H}", "logging.run_name=${now:%H}: each rank would read its own clock"),
        ("logging/mine", "run_name: '${oc.env:'", "logging.run_name=${oc.env:: the interpolation cannot be read"),
        ("data/mine", "seq_length: 5", "data.seq_length: no such key; here it is data.seq_len"),
        ("data/mine", "paths: 5", "data.paths=5: must be a list: [a,b]"),
        ("data/mine", "- seq_len", "holds no keys; write lines of `key: value`"),
        ("data/mine", b"name: caf\xe9", ", line 1: is not UTF-8; save the file in this encoding"),
        ("data/mine", "name: a\x07", ", line 1: not valid YAML: a character '\\x07', which YAML does not allow"),
        ("data/mine", "name: [", "not valid YAML: "),
        ("data/mine", "[" * 5000, "not valid YAML: is nested too deeply"),
        ("data/mine", "paths: &a [*a]", ", line 1: an alias refers to itself; write the values"),
        ("data/mine", BOMB, "its aliases expand to more than 50,000 values"),
        ("data/mine", "defaults: [mine]", "a defaults list leads back to a file that names it; take that entry out"),
        ("data/mine", "defaults: 3", "defaults: must be a list of names"),
        ("data/mine", "name: " + "x" * 2**20, "is larger than 1,048,576 bytes"),
        ("data/mine", Path("/proc/self/mem"), "cannot be read (Input/output error); give a YAML file that can"),
        ("data/mine", Path("/dev/zero"), "is not a regular file"),
        ("data/files", "seq_len: 5", "data=files is an option of this package; rename the file"),
        (
            "experiment/mine",
            "train: {steps: 3}",
            "its first line must be `# @package _global_`, since there is no section",
        ),
        (
            "experiment/mine",
            "# @package _global_\ntrain: {stpes: 3}",
            "train.stpes: no such key; did you mean train.steps?",
        ),
    ],
)
def test_trouble_with_a_file_of_the_user_is_one_line_at_every_entry_point(
    entry_point: str,
    name: str,
    body: str | bytes | Path,
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / f"{name}.yaml"
    file.parent.mkdir()
    if isinstance(body, Path):
        file.symlink_to(body)
    else:
        file.write_bytes(body if isinstance(body, bytes) else body.encode())
    (line,) = refused(capsys, entry_point, f"--config-dir={tmp_path}", name.replace("/", "="), "data.paths=[a]")
    assert problem in line and (line.startswith(str(file)) or name.startswith("train"))


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text("seq_len: many\npacking: 1\nnmae: x\nshuffle:\n")
    lines = refused(capsys, "launch", f"--config-dir={tmp_path}", "data=mine")
    assert [line.partition("mine.yaml: ")[2].partition(":")[0] for line in lines] == [
        "data.seq_len=many",
        "data.packing=1",
        "data.nmae",
        "data.shuffle=",
    ]


def test_a_folder_with_any_name_is_searched(tmp_path: Path) -> None:
    folder = tmp_path / "it's, a [folder] = $x"
    (folder / "data").mkdir(parents=True)
    (folder / "data/mine.yaml").write_text("<<: {seq_len: 3, packing: false}\nseq_len: 64\n")
    assert load_config(["data=mine"], config_dir=str(folder)).data.seq_len == 64


def test_the_answers_to_foreign_names_exist() -> None:
    groups = group_options()
    names = [(name, entry) for section in foreign.table().values() for name, entry in section.items()]
    assert len(names) > 700
    for name, entry in names:
        assert entry.keys if entry.fate is Fate.translated else entry.note, name
        for spelling in entry.keys:
            key, equals, _ = spelling.partition("=")
            assert key in schema_keys() or (key in groups and "." not in key), (name, spelling)
            assert not check_overrides([spelling] if equals else [], groups)
        for here in (entry.values or {}).values():
            assert foreign.entry(here).note if isinstance(here, str) else schema_keys().keys() >= here.keys(), name


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("train.learning_rate", "here it is optimizer.lr"),
        ("zero_optimization.stage", "here it is parallel.zero_stage"),
        ("train.tensor_parallel_degree", "here it is parallel.tp"),
        ("zero_quantized_weights", "there is none for it: parameters are gathered in precision.param_dtype"),
        ("data.dataloader_pin_memory", None),
    ],
)
def test_keys_of_other_trainers_are_answered(key: str, said: str | None) -> None:
    (line,) = check_overrides([f"{key}=1"], group_options())
    assert said is None or f"no such key; {said}" in line


def test_what_the_environment_gives_is_used_and_not_written_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_KEY", "hush")
    words = [
        "logging.options={key: '${oc.env:A_KEY}', list: ['x-${oc.env:A_KEY}']}",
        "logging.run_name=${logging.options.key}-1",
        "train.run_dir='\\${A_KEY}'",
        "optimizer.lr=${oc.env:A_RATE,1e-3}",
    ]
    config = load_config(words)
    assert config.logging.options == {"key": "hush", "list": ["x-hush"]}
    assert (config.logging.run_name, config.train.run_dir, config.optimizer.lr) == ("hush-1", "${A_KEY}", 1e-3)
    assert launch([*words, "--cfg", "job"]) == 0
    written = capsys.readouterr().out
    assert "hush" not in written and written.rstrip() == to_yaml(config).rstrip()
    assert from_yaml(written) == config
    monkeypatch.delenv("A_KEY")
    elsewhere = from_yaml(written)
    assert elsewhere.logging.options["key"] == "${oc.env:A_KEY}"
    assert to_yaml(elsewhere).rstrip() == written.rstrip()


def test_the_clock_is_read_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["parallel=ddp", "train.run_dir=runs/${now:%Y-%m-%d}", "dry_run=true", "cluster.device=cpu"]
    assert launch(words) == 0
    assert re.search(r"train\.run_dir=runs/\d{4}-\d\d-\d\d( |$)", capsys.readouterr().out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = refused(capsys, "trainer", *words)
    assert line.startswith("train.run_dir=runs/${now:%Y-%m-%d}: each rank would read its own clock; start with")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "launch", "--cfg", "job"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as job:
        assert job.stdout is not None and job.stderr is not None
        job.stdout.close()
        assert not job.stderr.read()
    assert job.returncode == 0
