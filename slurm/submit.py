"""Submission: everything that can be checked is checked, Slurm is asked, and only then are files written.

plan and memory (entry point) -> options -> run folder -> sbatch --test-only -> RUN_DIR/slurm -> sbatch
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from configs.errors import ConfigError, EnvironmentProblem
from configs.load import to_yaml
from configs.overrides import quote_value
from configs.schema import Config
from slurm.arguments import restart_overrides
from slurm.control import living_job
from slurm.job import JOB_IDS, MEMORY, STATUS, Job, folder, write_job
from slurm.options import check_options, is_chain, output_pattern, sbatch_arguments, show, srun_arguments
from trainer.plan.length import planned_steps
from trainer.plan.plan import Plan
from trainer.process.disks import writing
from trainer.process.files import replace_text
from trainer.process.status import check_unfinished
from trainer.process.world import source_root

COMMAND = "sbatch.txt"
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
# sbatch's messages, and the key that can change each.
REFUSALS = (
    (r"invalid partition", "cluster.slurm.partition", "`sinfo -s` lists them"),
    (r"time limit", "cluster.slurm.time", "`sinfo -s` shows each partition's limit"),
    (r"account", "cluster.slurm.account", "`sacctmgr show associations user=$USER` lists yours"),
    (r"\bqos\b", "cluster.slurm.qos", "`sacctmgr show qos` lists them"),
    (r"feature|constraint", "cluster.slurm.constraint", "`sinfo -o %f` lists them"),
    (r"dependency", "cluster.slurm.dependency", "`squeue --me` lists your jobs"),
    (r"gres|generic resource", "cluster.gpus_per_node", "`sinfo -o '%P %D %G'` shows what nodes have"),
    (r"memory", "cluster.slurm.mem", "`sinfo -o '%P %m'` shows what nodes have"),
)


def submit(
    config: Config, plan: Plan, overrides: Sequence[str], *, config_dir: str | None, run_dir: Path, root: Path
) -> str:
    """Submit one run to Slurm. Returns the job's id.

    overrides: as typed; the ranks compose from them again. run_dir: unused, or of a run to continue. root: working
    directory of the job. Raises CookbookError before anything is written.
    """
    check(config, run_dir)
    sbatch = command(config, plan, run_dir)
    ask(config, sbatch)
    with writing(run_dir):
        prepare(config, plan, overrides, config_dir=config_dir, run_dir=run_dir)
        replace_text(folder(run_dir) / COMMAND, shlex.join(sbatch) + "\n")
    job_id = _submitted(config, sbatch, root)
    _note(run_dir, job_id)
    return job_id


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One run of a sweep."""

    config: Config
    plan: Plan
    overrides: Sequence[str]


def submit_sweep(points: Sequence[SweepPoint], *, config_dir: str | None, sweep_dir: Path, root: Path) -> str:
    """Submit a sweep to Slurm as one array; each point's run folder is sweep_dir/NUMBER. Returns the array's id.

    Raises CookbookError before anything is written, also if the points ask Slurm for different resources.
    """
    sbatch = check_sweep(points, sweep_dir)
    ask(points[0].config, sbatch)
    for number, point in enumerate(points):
        run_dir = sweep_dir / str(number)
        with writing(run_dir):
            prepare(point.config, point.plan, point.overrides, config_dir=config_dir, run_dir=run_dir)
            replace_text(folder(run_dir) / COMMAND, shlex.join(sbatch) + "\n")
    job_id = _submitted(points[0].config, sbatch, root)
    for number in range(len(points)):
        _note(sweep_dir / str(number), f"{job_id}_{number}")
    return job_id


def check_sweep(points: Sequence[SweepPoint], sweep_dir: Path) -> list[str]:
    """The sbatch command of the array. Raises CookbookError with all problems before Slurm is asked."""
    for number, point in enumerate(points):
        check(point.config, sweep_dir / str(number), sweep=True)
    commands = [command(point.config, point.plan, sweep_dir, points=len(points)) for point in points]
    for number, each in enumerate(commands):
        other = [word for word in each if word not in commands[0] and not word.startswith("--job-name=")]
        if other:
            raise ConfigError(
                f"cluster.slurm.array={points[0].config.cluster.slurm.array}: point {number} asks Slurm for {other[0]},"
                " which an array has in common; leave cluster.slurm.array out, and each point is a job"
            )
    return commands[0]


def check(config: Config, run_dir: Path, *, sweep: bool = False) -> None:
    """Raises CookbookError with all problems before Slurm is asked."""
    problems = [*check_options(config, sweep=sweep), *_check_folder(run_dir)]
    if problems:
        raise ConfigError(*problems)
    check_unfinished(config, run_dir)
    if shutil.which("sbatch") is None and not config.dry_run:
        raise EnvironmentProblem(
            "cluster.kind=slurm: there is no sbatch on PATH; run this on a login node, or choose cluster=local"
            " (dry_run=true shows what would be submitted)"
        )
    job = living_job(run_dir) if not config.dry_run else None
    if job is not None:
        raise EnvironmentProblem(
            f"train.run_dir={run_dir}: job {job} of this run is in the queue; choose another folder, or first"
            f" python -m launch cancel {shlex.quote(str(run_dir))}"
        )


def command(config: Config, plan: Plan, run_dir: Path, *, points: int | None = None) -> list[str]:
    """sbatch, its options, the script and the script's arguments. points: of a sweep in one array."""
    array = config.cluster.slurm.array if points is None else f"0-{points - 1}{config.cluster.slurm.array or ''}"
    name = f"slurm-{'%j' if array is None else '%A_%a'}.out"
    output = output_pattern(run_dir, f"logs/{name}" if points is None else f"%a/logs/{name}")
    options = sbatch_arguments(config, plan, output=output, array=array)
    script = config.cluster.slurm.script
    path = Path(script).expanduser().absolute() if script else Path(str(files("slurm") / "job.sbatch"))
    return ["sbatch", *options, str(path), str(run_dir), sys.executable, *(["sweep"] if points else [])]


def ask(config: Config, sbatch: Sequence[str]) -> None:
    """sbatch accepts a job that no node can ever run, and lets it wait; --test-only refuses it."""
    _sbatch(config, [sbatch[0], "--test-only", *sbatch[1:]], Path.cwd())


def prepare(config: Config, plan: Plan, overrides: Sequence[str], *, config_dir: str | None, run_dir: Path) -> None:
    """Write the files that the job reads."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    ours = folder(run_dir)
    ours.mkdir(exist_ok=True)
    for name in (MEMORY, STATUS):
        (ours / name).unlink(missing_ok=True)
    write_job(run_dir, make_job(config, plan, overrides, config_dir=config_dir, run_dir=run_dir))
    replace_text(ours / "config.yaml", to_yaml(config))
    replace_text(ours / "setup.sh", "".join(f"{line}\n" for line in [*config.cluster.slurm.setup, *_search_path()]))


def _search_path() -> Iterator[str]:
    """What the batch script does after the user's lines: a `slurm.py` where the job starts is not taken for ours."""
    yield "export PYTHONSAFEPATH=1"
    if (root := source_root()) is not None:
        yield f'export PYTHONPATH={shlex.quote(root)}"${{PYTHONPATH:+:$PYTHONPATH}}"'


def make_job(config: Config, plan: Plan, overrides: Sequence[str], *, config_dir: str | None, run_dir: Path) -> Job:
    """The job's command. Its ranks compose from the same overrides, with the run folder as an absolute path."""
    search = ["--config-dir", str(Path(config_dir).expanduser().absolute())] if config_dir is not None else []
    passed_on = [word for word in overrides if not word.startswith(("dry_run=", "train.run_dir="))]
    settled = f"train.run_dir={quote_value(str(run_dir))}"
    slurm = config.cluster.slurm
    again = [*search, *restart_overrides(passed_on, config.train.resume), settled]
    return Job(
        words=[*search, *passed_on, settled],
        again=again,
        launcher=str(config.launcher.name),
        launcher_args=list(config.launcher.args),
        device=plan.device,
        nodes=plan.nodes,
        processes=plan.gpus_per_node,
        python=slurm.python or sys.executable,
        srun=srun_arguments(config),
        chain=is_chain(config),
        max_restarts=config.launcher.max_restarts,
        max_requeues=slurm.max_requeues,
        start_minutes=slurm.start_minutes,
        stuck_minutes=config.train.timeout_minutes + 2,
        goes_on=_goes_on(again, slurm.array),
        steps=planned_steps(config),
        epochs=config.train.epochs,
    )


def _goes_on(overrides: Sequence[str], array: str | None) -> str:
    """The command for one run; a point of a sweep continues alone."""
    if array is not None and array.startswith("%"):
        overrides = [
            *(word for word in overrides if not word.startswith("cluster.slurm.array=")),
            "cluster.slurm.array=null",
        ]
    return shlex.join(["python", "-m", "launch", *overrides])


def script_text(config: Config) -> str:
    """The batch script that is submitted."""
    script = config.cluster.slurm.script
    return Path(script).expanduser().read_text() if script else (files("slurm") / "job.sbatch").read_text()


def script_additions(config: Config) -> list[str]:
    """Further input of a job from the run folder: the lines that the script sources, and the arguments of srun."""
    setup, srun = config.cluster.slurm.setup, srun_arguments(config)
    lines = [f"slurm/setup.sh  {line}" for line in setup]
    return [*lines, f"srun            {shlex.join(srun)}"] if srun else lines


def _submitted(config: Config, sbatch: Sequence[str], root: Path) -> str:
    # A federation adds the cluster's name.
    return _sbatch(config, [sbatch[0], "--parsable", *sbatch[1:]], root).split(";")[0]


def _note(run_dir: Path, job_id: str) -> None:
    with writing(run_dir), open(folder(run_dir) / JOB_IDS, "a") as ids:
        ids.write(f"{job_id}\n")


def _sbatch(config: Config, sbatch: Sequence[str], root: Path) -> str:
    """Raises EnvironmentProblem with Slurm's own message in one line, and the key that it concerns."""
    try:
        done = subprocess.run(sbatch, cwd=root, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem("cluster.kind=slurm: sbatch does not answer; try again later") from None
    if done.returncode == 0:
        return done.stdout.strip()
    lines = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in done.stderr.splitlines()]
    said = "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip())) or f"exit code {done.returncode}"
    if re.search(r"node count|node configuration|more processors", said, re.IGNORECASE):
        # Slurm does not say which of these is missing.
        parts = [
            word for word in sbatch if word.startswith(("--cpus-per-task=", "--gpus-per-node=", "--gres=", "--mem="))
        ]
        raise EnvironmentProblem(
            f"cluster.nodes={config.cluster.nodes}: Slurm refuses ({said}): it has not so many nodes with"
            f" {' '.join(parts)}; `sinfo -o '%P %D %c %m %G'` shows what there is"
        )
    for pattern, key, remedy in REFUSALS:
        if re.search(pattern, said, re.IGNORECASE):
            raise EnvironmentProblem(f"{key}={_value(config, key)}: Slurm refuses ({said}); {remedy}")
    raise EnvironmentProblem(f"cluster.kind=slurm: Slurm refuses ({said}); `sinfo` shows what there is")


def _value(config: Config, key: str) -> str:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return show(str(value))


def _check_folder(run_dir: Path) -> list[str]:
    text = str(run_dir)
    if "\\" in text or not text.isprintable():
        # A backslash would disable Slurm's patterns in the log's name.
        return [f"train.run_dir={show(text)}: Slurm cannot write a log there; use a path without backslashes"]
    kind = _file_system(run_dir)
    if kind in IN_MEMORY:
        return [f"train.run_dir={text}: lies in this machine's memory ({kind}); choose a folder that all nodes share"]
    return []


def _file_system(path: Path) -> str:
    """Type of the mount that contains a path; empty if unknown."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    points = {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), point): kind for point, kind in mounts}
    return next((points[str(at)] for at in (path, *path.parents) if str(at) in points), "")
