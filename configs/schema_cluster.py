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
    """A run is one JobSet with a pod per node. Null leaves a field to the cluster's default."""

    image: str | None = None
    """Image in which this project is installed (`launch/kubernetes/Dockerfile` builds one)."""
    volume: str | None = None
    """PersistentVolumeClaim that all pods mount, for the run folder; several nodes need one that is ReadWriteMany."""
    mount: str = "/runs"
    """Where the pods see that volume; `train.run_dir` lies below it."""
    namespace: str | None = None
    """Null: that of kubectl's context."""
    context: str | None = None
    """Cluster and user of the kubeconfig; null: the current one."""
    queue: str | None = None
    """Local queue of Kueue, which starts all pods of a run together."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name under which the device plug-in offers GPUs."""
    cpus: int | None = None
    """CPU cores that each pod asks for."""
    memory: str | None = None
    """Host memory that each pod asks for and may use: `512Gi`."""
    shared_memory: str = "16Gi"
    """Size of /dev/shm in each pod, which NCCL and loader processes use. It counts as the pod's memory."""
    port: int = 29500
    """Where the ranks meet on the first pod."""
    grace_seconds: int = 180
    """From the warning (eviction, deletion) to the kill: the ranks save in between."""
    service_account: str | None = None
    secrets: list[str] = field(default_factory=list)
    """Secrets whose entries become environment variables: a hub token, a tracker's key."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further environment variables of the pods: `{NCCL_DEBUG: INFO}`."""
    pod: dict[str, Any] = field(default_factory=dict)
    """Further fields of the pod's spec: `{nodeSelector: {gpu: h100}}`. Those that this project writes are refused."""


@dataclass(kw_only=True, slots=True)
class Ray:
    """A run is one placement group with a bundle per node. `python -m launch` looks after it until it ends."""

    address: str | None = None
    """HOST:PORT of the cluster, `auto` (the one that runs on this machine) or `local` (a new one, which ends with the
    run). Null: RAY_ADDRESS, else `auto` where `ray start` was used, else `local`."""
    cpus_per_node: int | None = None
    """CPUs in each bundle; null: one for each rank."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further resources in each bundle, which choose the nodes: `{accelerator_type\\:H100: 0.001}`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further environment variables of the ranks: `{NCCL_SOCKET_IFNAME: eth0}`."""
    start_minutes: float = 20.0
    """How long a start waits for nodes that others use, or that are to replace lost ones."""
    autoscaling: bool = False
    """The cluster adds nodes on demand: also wait for nodes that it does not have yet."""


@dataclass(kw_only=True, slots=True)
class Slurm:
    """Each is an option of sbatch unless it says otherwise; null leaves it to the cluster's default."""

    job_name: str | None = None
    """Null: MODEL-LAYOUT-PRECISION, as the run folder."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit of one job: MINUTES, HH:MM:SS or D-HH:MM:SS. The run may take longer: the job goes back to the queue."""
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    """How this cluster wants to be asked for GPUs: `--gpus-per-node`, `--gres=gpu`, or not at all."""
    gpu_type: str | None = None
    """The cluster's own name of a GPU type, which goes into that request."""
    cpus_per_node: int | None = None
    """`--cpus-per-task`: one task per node holds all ranks of the node."""
    mem: str | None = None
    """Host memory per node: `64G`; `0` is all of it."""
    constraint: str | None = None
    dependency: str | None = None
    array: str | None = None
    """`1-8%1`: so many jobs, one after another, in the same run folder, where a job may not requeue itself. For a
    sweep (`-m`) `%4`: one array with an element per point, four at a time; null: one job per point."""
    container: str | None = None
    """Image for every node's ranks: `srun --container-image` of the pyxis plug-in."""
    container_mounts: list[str] = field(default_factory=list)
    """`srun --container-mounts`, each FROM:TO; the run folder must be one of them or lie below."""
    python: str | None = None
    """Interpreter of the ranks, where it is not that of the submission: in a container, or from `setup`."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that the job runs first: `[module load cuda/12.8, source /opt/env.sh]`."""
    sbatch_args: list[str] = field(default_factory=list)
    """Any further options of sbatch, each one word: `[--exclude=node7, --mail-type=END]`."""
    srun_args: list[str] = field(default_factory=list)
    """Any further options of srun, each one word."""
    script: str | None = None
    """A batch script instead of `slurm/job.sbatch`; it gets the same two arguments."""
    signal_seconds: int = 180
    """Seconds before the time limit at which the job is signalled to save and stop. Slurm may be a minute early."""
    max_requeues: int = 100
    """Maximum number of requeues. Those without a new checkpoint in between count for `launcher.max_restarts`."""
    start_minutes: float = 20.0
    """A start whose ranks have not met by then is ended and tried again."""


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
    """Processes per node. Null: what the launcher started; else this machine's GPUs; else CPU processes."""
    gpu: str | None = None
    """A known GPU (`trainer/plan/devices.py`) by a usual name, for its memory and peak FLOP/s: h100, a100-80gb,
    rtx4090. Null: the one that is found."""
    gpu_memory_gib: float | None = None
    """Memory of the GPU that an estimate is compared with; null: that of `gpu`."""
    expandable_segments: bool = True
    """The CUDA allocator grows one segment per stream instead of asking for further ones, and gives back what is free
    before it fails: `PYTORCH_ALLOC_CONF=expandable_segments:True` for the run, and the rules of the estimate."""
    network_gb_per_second: float | None = None
    """Read by `estimate.search`: what one GPU sends to other nodes, 1e9 bytes/s in one direction (an adapter of
    400 Gb/s per GPU: 50). Null: 50."""
    host_gb_per_second: float = 25.0
    """Read by `estimate.search`: what one GPU exchanges with its node's memory, 1e9 bytes/s in one direction."""
    nvme_gb_per_second: float = 3.0
    """Read by `estimate.search`: a GPU's share of its node's NVMe disks, 1e9 bytes/s."""


@dataclass(kw_only=True, slots=True)
class Launcher:
    name: LauncherName = LauncherName.torchrun
    """What `python -m launch` starts the ranks with."""
    master_port: int | None = None
    """Rendezvous port; null: a free one."""
    args: list[str] = field(default_factory=list)
    """Further arguments for the launcher, before `-m trainer`."""
    max_restarts: int = 3
    """When a worker dies or hangs, the job is started again from its newest checkpoint, at most so many times in
    a row. A restart that gets to a new checkpoint restarts the count. 0: never."""
    preflight: bool | None = None
    """All ranks together compare versions and devices, measure the network, and try the run folder and the disks,
    before anything is built. Null: where there is more than one node."""
