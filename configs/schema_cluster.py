"""Keys of `cluster` and `launcher`: where the ranks run, and what starts them. `configs.schema` holds all sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.choices import (
    ClusterKind,
    Device,
    GpuRequest,
    LauncherName,
)


@dataclass(kw_only=True, slots=True)
class Kubernetes:
    """A run is one JobSet with one pod per node. Null leaves a field to the cluster's default."""

    image: str | None = None
    """Image in which this project is installed (`launch/kubernetes/Dockerfile` builds one)."""
    volume: str | None = None
    """PersistentVolumeClaim for the run folder, mounted by all pods; several nodes need a ReadWriteMany claim."""
    mount: str = "/runs"
    """Mount point of that volume in the pods; `train.run_dir` lies below it."""
    namespace: str | None = None
    """Namespace; null: that of kubectl's context."""
    context: str | None = None
    """Cluster and user of the kubeconfig; null: the current one."""
    queue: str | None = None
    """Local queue of Kueue, which starts all pods of a run together."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name under which the device plug-in offers GPUs."""
    cpus: int | None = None
    """CPU cores per pod."""
    memory: str | None = None
    """Host memory per pod, requested and limited: `512Gi`."""
    shared_memory: str = "16Gi"
    """Size of /dev/shm in each pod, for NCCL and loader processes. It counts as the pod's memory."""
    port: int = 29500
    """Rendezvous port on the first pod."""
    grace_seconds: int = 180
    """Seconds between the warning (eviction, deletion) and the kill; the ranks save in this time."""
    service_account: str | None = None
    secrets: list[str] = field(default_factory=list)
    """Secrets whose entries become environment variables: a hub token, a tracker's key."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further environment variables of the pods: `{NCCL_DEBUG: INFO}`."""
    pod: dict[str, Any] = field(default_factory=dict)
    """Further fields of the pod's spec: `{nodeSelector: {gpu: h100}}`. Fields that this project writes are refused."""


@dataclass(kw_only=True, slots=True)
class Ray:
    """A run is one placement group with one bundle per node. `python -m launch` supervises it until it ends."""

    address: str | None = None
    """HOST:PORT of the cluster, `auto` (the cluster that runs on this machine) or `local` (a new one, which ends with
    the run). Null: RAY_ADDRESS, else `auto` where `ray start` was used, else `local`."""
    cpus_per_node: int | None = None
    """CPUs per bundle; null: one per rank."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further resources per bundle, which select the nodes: `{accelerator_type\\:H100: 0.001}`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further environment variables of the ranks: `{NCCL_SOCKET_IFNAME: eth0}`."""
    start_minutes: float = 20.0
    """Minutes that a start waits for busy nodes, or for nodes that replace lost ones."""
    autoscaling: bool = False
    """The cluster adds nodes on demand: also wait for nodes that it does not have yet."""


@dataclass(kw_only=True, slots=True)
class Slurm:
    """Each is an option of sbatch unless stated otherwise; null leaves it to the cluster's default."""

    job_name: str | None = None
    """Job name; null: MODEL-LAYOUT-PRECISION, as the run folder."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str | None = None
    """Time limit of one job: MINUTES, HH:MM:SS or D-HH:MM:SS. A longer run goes back to the queue."""
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    """How this cluster expects GPU requests: `--gpus-per-node`, `--gres=gpu`, or none."""
    gpu_type: str | None = None
    """The cluster's own name for a GPU type, part of that request."""
    cpus_per_node: int | None = None
    """`--cpus-per-task`: one task per node holds all ranks of the node."""
    mem: str | None = None
    """Host memory per node: `64G`; `0` is all of it."""
    constraint: str | None = None
    dependency: str | None = None
    array: str | None = None
    """`1-8%1`: this many jobs, one after another, in the same run folder, where a job may not requeue itself. For a
    sweep (`-m`) `%4`: one array with an element per point, four at a time; null: one job per point."""
    container: str | None = None
    """Image for every node's ranks: `srun --container-image` of the pyxis plug-in."""
    container_mounts: list[str] = field(default_factory=list)
    """`srun --container-mounts`, each FROM:TO; the run folder must be one of them or lie below."""
    python: str | None = None
    """Interpreter of the ranks, if it differs from the submission's: in a container, or from `setup`."""
    setup: list[str] = field(default_factory=list)
    """Bash lines that the job runs first: `[module load cuda/12.8, source /opt/env.sh]`."""
    sbatch_args: list[str] = field(default_factory=list)
    """Further options of sbatch, one word each: `[--exclude=node7, --mail-type=END]`."""
    srun_args: list[str] = field(default_factory=list)
    """Further options of srun, one word each."""
    script: str | None = None
    """A batch script that replaces `slurm/job.sbatch`; it gets the same two arguments."""
    signal_seconds: int = 180
    """Seconds before the time limit at which the job is signalled to save and stop. Slurm may be a minute early."""
    max_requeues: int = 100
    """Maximum number of requeues. Those without a new checkpoint in between count for `launcher.max_restarts`."""
    start_minutes: float = 20.0
    """Minutes for the ranks to meet; a start that takes longer is ended and retried."""


@dataclass(kw_only=True, slots=True)
class Cluster:
    kind: ClusterKind = ClusterKind.local
    """Where `python -m launch` starts the ranks: on this machine (`local`), as a job (`slurm`,
    `kubernetes`), or on the nodes of a Ray cluster (`ray`)."""
    slurm: Slurm = field(default_factory=Slurm)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    ray: Ray = field(default_factory=Ray)
    device: Device = Device.auto
    """`auto`: CUDA where there is a GPU, else the CPU."""
    nodes: int = 1
    gpus_per_node: int | None = None
    """Processes per node. Null: the launcher's number; else this machine's GPUs; else CPU processes."""
    gpu: str | None = None
    """A known GPU (`trainer/plan/devices.py`) by a common name, for its memory and peak FLOP/s: h100, a100-80gb,
    rtx4090. Null: the detected one."""
    gpu_memory_gib: float | None = None
    """GPU memory that an estimate is compared with; null: that of `gpu`."""
    expandable_segments: bool = True
    """The CUDA allocator grows one segment per stream instead of requesting further ones, and returns free memory
    before it fails: sets `PYTORCH_ALLOC_CONF=expandable_segments:True` for the run, and the estimate follows."""
    network_gb_per_second: float | None = None
    """Read by `estimate.search`: bandwidth between nodes per GPU, 1e9 bytes/s in one direction (an adapter of 400 Gb/s
    per GPU: 50). Null: 50."""
    host_gb_per_second: float = 25.0
    """Read by `estimate.search`: bandwidth between a GPU and its node's memory, 1e9 bytes/s in one direction."""
    nvme_gb_per_second: float = 3.0
    """Read by `estimate.search`: a GPU's share of its node's NVMe bandwidth, 1e9 bytes/s."""


@dataclass(kw_only=True, slots=True)
class Launcher:
    name: LauncherName = LauncherName.torchrun
    """Launcher that `python -m launch` starts the ranks with."""
    master_port: int | None = None
    """Rendezvous port; null: a free one."""
    args: list[str] = field(default_factory=list)
    """Further arguments for the launcher, before `-m trainer`."""
    max_restarts: int = 3
    """Maximum number of restarts in a row from the newest checkpoint when a worker dies or hangs. A restart that
    reaches a new checkpoint resets the count. 0: never."""
    preflight: bool | None = None
    """Before anything is built, all ranks compare versions and devices, measure the network, and test the run folder
    and the disks. Null: only with more than one node."""
