"""From `cluster.slurm` to the arguments of sbatch. Pure; each text is checked against Slurm's syntax.

The arguments go to sbatch unchanged, through no shell and into no script: the patterns catch typos and are not a
security boundary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from configs.choices import Device, GpuRequest
from configs.schema import Cluster, Config
from trainer.plan.plan import Plan
from trainer.process.world import VARIABLES
from trainer.report.folder import run_label

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
NAME, NAMES = r"[A-Za-z0-9_][\w.+@:-]*", r"[A-Za-z0-9_][\w.+@:,-]*"
TIME = r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}"
# key: (pattern, remedy)
PATTERNS = {
    "job_name": (r"[A-Za-z0-9_][\w.+=@:/-]{0,127}", "letters, digits and ._+=@:/-, at most 128"),
    "account": (NAME, "a name of `sacctmgr show associations`"),
    "partition": (NAMES, "names of `sinfo`, with commas between them"),
    "qos": (NAME, "a name of `sacctmgr show qos`"),
    "time": (TIME, "MINUTES, HH:MM:SS or D-HH:MM:SS"),
    "gpu_type": (NAME, "a type of `sinfo -o %G`"),
    "mem": (r"\d+[KMGT]?", "megabytes, or a number with K, M, G or T; 0 for all of a node"),
    "constraint": (r"[A-Za-z0-9_][\w.&|,*!()\[\]@-]*", "features of `sinfo -o %f`"),
    "dependency": (
        r"singleton|[a-z]+:\d+[\d:_+]*([,?][a-z]+:\d+[\d:_+]*)*",
        "afterok:JOBID, afterany:JOBID:JOBID or singleton",
    ),
    "array": (r"\d+-\d+%1|%\d+", "1-8%1 for jobs one after another; %4 for a sweep, four points at a time"),
    "container": (r"[A-Za-z0-9_./][^\s,]*", "an image: a path or a name, without blanks and commas"),
    "python": (r"[A-Za-z0-9_./~][^\s]*", "a path or a program's name"),
}
# Options that have their own key here, or would break the job.
OURS = {
    "job-name": "cluster.slurm.job_name",
    "account": "cluster.slurm.account",
    "partition": "cluster.slurm.partition",
    "qos": "cluster.slurm.qos",
    "time": "cluster.slurm.time",
    "nodes": "cluster.nodes",
    "gpus-per-node": "cluster.gpus_per_node",
    "gres": "cluster.gpus_per_node and cluster.slurm.gpu_request",
    "cpus-per-task": "cluster.slurm.cpus_per_node",
    "mem": "cluster.slurm.mem",
    "constraint": "cluster.slurm.constraint",
    "dependency": "cluster.slurm.dependency",
    "array": "cluster.slurm.array",
    "signal": "cluster.slurm.signal_seconds",
    "wrap": "cluster.slurm.script",
    "output": "train.run_dir",
    "chdir": "the folder you submit from",
    "ntasks": "cluster.nodes",
    "ntasks-per-node": "cluster.gpus_per_node",
    "parsable": "nothing",
    "test-only": "dry_run=true",
}


def check_nodes(cluster: Cluster) -> Iterator[str]:
    """Settings that must be given explicitly when the nodes are not this machine, for any kind of cluster."""
    if cluster.device is Device.auto:
        yield "cluster.device=auto: what this machine has says nothing about the nodes; set cuda or cpu"
    if cluster.device is not Device.cpu and cluster.gpus_per_node is None:
        yield "cluster.gpus_per_node=null: this machine's GPUs say nothing about the nodes'; set their number"


def check_environment(key: str, given: Iterable[str], *, taken: Sequence[str] = ()) -> Iterator[str]:
    """Variables that a node cannot pass to its ranks. given: names. taken: further variables that the cluster sets."""
    for name in given:
        if name in (*VARIABLES, *taken):
            yield f"{key}={{{name}: ...}}: says who the ranks are and where they meet; leave it out"
        elif not re.fullmatch(VARIABLE, name, re.ASCII):
            yield f"{key}={{{name}: ...}}: no name of a variable"


def check_options(config: Config, *, sweep: bool = False) -> Iterator[str]:
    """One line for each option that sbatch would not understand, or that would have another effect than meant."""
    slurm, cluster = config.cluster.slurm, config.cluster
    for key, (pattern, remedy) in PATTERNS.items():
        value = getattr(slurm, key)
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            yield f"cluster.slurm.{key}={show(value)}: not understood by Slurm; write {remedy}"
    yield from check_nodes(cluster)
    if config.launcher.master_port is not None:
        yield f"launcher.master_port={config.launcher.master_port}: a job finds a free port at each start; leave it out"
    if slurm.array is not None and slurm.array.startswith("%") != sweep:
        what = "a sweep is submitted as %4, four points at a time" if sweep else "one run takes 1-8%1; %4 is for -m"
        yield f"cluster.slurm.array={slurm.array}: {what}"
    yield from _check_signal(config)
    for key, arguments in (("sbatch_args", slurm.sbatch_args), ("srun_args", slurm.srun_args)):
        for word in arguments:
            name = word.partition("=")[0].removeprefix("--")
            if not re.fullmatch(r"--[a-z][a-z0-9-]*(=[^\x00-\x1f\x7f]*)?", word):
                yield f"cluster.slurm.{key}=[{show(word)}]: each is one word, --option or --option=value"
            elif key == "sbatch_args" and name in OURS:
                yield f"cluster.slurm.sbatch_args=[{show(word)}]: use {OURS[name]}"
    yield from _check_files(config)


def _check_signal(config: Config) -> Iterator[str]:
    slurm = config.cluster.slurm
    seconds = limit_seconds(slurm.time)
    if seconds is not None and 2 * slurm.signal_seconds > seconds:
        yield (
            f"cluster.slurm.signal_seconds={slurm.signal_seconds}: more than half of cluster.slurm.time={slurm.time},"
            " so that the job would mostly start and stop; set less, or a longer time"
        )


def _check_files(config: Config) -> Iterator[str]:
    slurm = config.cluster.slurm
    if slurm.script is not None and not Path(slurm.script).expanduser().is_file():
        yield f"cluster.slurm.script={show(slurm.script)}: no such file; give a batch script, or leave it out"
    if slurm.container_mounts and slurm.container is None:
        yield "cluster.slurm.container_mounts: has no effect without cluster.slurm.container"
    for mount in slurm.container_mounts:
        if not re.fullmatch(r"[^\s,:]+(:[^\s,:]+){1,2}", mount):
            yield f"cluster.slurm.container_mounts=[{show(mount)}]: write FROM:TO, without blanks and commas"
    if any("\x00" in line or "\n" in line for line in slurm.setup):
        yield "cluster.slurm.setup: each element is one line"


def limit_seconds(time: str | None) -> int | None:
    """A Slurm time limit in seconds: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. None if it has another form."""
    if time is None or not re.fullmatch(TIME, time):
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def show(text: str) -> str:
    """Any text, reduced to one line of a message."""
    plain = text if text.isprintable() else repr(text)[1:-1]
    return plain if len(plain) <= 60 else plain[:60] + "..."


def sbatch_arguments(config: Config, plan: Plan, *, output: str, array: str | None) -> list[str]:
    """The options of sbatch, without the script. output: pattern of the log's name. array: in Slurm's form."""
    slurm = config.cluster.slurm
    given = {
        "job-name": slurm.job_name or run_label(config),
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "time": slurm.time,
        "nodes": str(plan.nodes),
        "ntasks-per-node": "1",
        # At least one CPU per rank, where the cluster would give one per task.
        "cpus-per-task": str(slurm.cpus_per_node or plan.gpus_per_node),
        **_gpu_arguments(config, plan),
        "mem": slurm.mem,
        "constraint": slurm.constraint,
        "dependency": slurm.dependency,
        "array": array,
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "output": output,
    }
    requeue = [] if is_chain(config) else ["--requeue"]
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*options, *requeue, "--open-mode=append", *slurm.sbatch_args]


def is_chain(config: Config) -> bool:
    """Whether the array's jobs follow each other in one run folder."""
    return config.cluster.slurm.array is not None and not config.cluster.slurm.array.startswith("%")


def _gpu_arguments(config: Config, plan: Plan) -> dict[str, str]:
    slurm = config.cluster.slurm
    if plan.device != "cuda" or slurm.gpu_request is GpuRequest.none:
        return {}
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    if slurm.gpu_request is GpuRequest.gres:
        return {"gres": f"gpu:{kind}{plan.gpus_per_node}"}
    return {"gpus-per-node": f"{kind}{plan.gpus_per_node}"}


def srun_arguments(config: Config) -> list[str]:
    """Additional options for srun."""
    slurm = config.cluster.slurm
    container = [f"--container-image={slurm.container}"] if slurm.container is not None else []
    mounts = [f"--container-mounts={','.join(slurm.container_mounts)}"] if slurm.container_mounts else []
    return [*container, *mounts, *slurm.srun_args]


def output_pattern(path: Path, name: str) -> str:
    """Slurm expands %j and the like in the log's name, so a % in the folder's name is doubled."""
    return f"{str(path).replace('%', '%%')}/{name}"
