"""Devices, communication, compilers, memory, limits, disk and scheduler of this machine."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.cuda import nccl

from configs.errors import EnvironmentProblem, first_line
from configs.packages import installed
from launch.doctor.fact import Fact
from launch.ray.cluster import find_cluster
from trainer.data.workers import SHARED_MEMORY
from trainer.engine.deepspeed.setup import find_ninja
from trainer.plan.machine import find_machine
from trainer.process.disks import existing, write_speed
from trainer.report.provenance import processor

GIB = 2**30
LITTLE_SHARED_MEMORY = GIB  # NCCL takes tens of MiB per pair of GPUs, each loader process a batch
FEW_FILES = 4096
INFINIBAND = Path("/sys/class/infiniband")
SECONDS = 10  # timeout for another program's answer


def machine(folder: Path) -> Iterator[Fact]:
    """folder: where runs are written."""
    yield Fact("system", f"{platform.platform()}, {platform.node()}")
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    yield Fact("cpu", f"{processor()}, {cores} cores of {os.cpu_count()} may be used")
    yield Fact("memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available")
    yield from _gpus()
    yield from _communication()
    yield from _compilers()
    yield _shared_memory()
    yield from _limits()
    yield _disk(folder)
    yield _slurm()
    yield from _ray()


def _gpus() -> Iterator[Fact]:
    built = torch.version.cuda or torch.version.hip
    seen, usable = find_machine().gpus, torch.cuda.device_count()
    if seen and not built:
        yield Fact(
            "gpu",
            f"the driver shows {seen}, but torch {torch.__version__} is built for CPUs alone; install torch for CUDA"
            " (https://pytorch.org/get-started)",
            well=False,
        )
    elif seen > usable:
        yield Fact(
            "gpu",
            f"the driver shows {seen}, torch for CUDA {built} can use {usable}; update the driver, or look into"
            " CUDA_VISIBLE_DEVICES",
            well=False,
        )
    elif not usable:
        yield Fact("gpu", f"none; torch {torch.__version__} computes on the CPU")
    for number in range(usable):
        yield _gpu(number)
    apart = [
        f"{one}-{other}"
        for one in range(usable)
        for other in range(one)
        if not torch.cuda.can_device_access_peer(one, other)
    ]
    if apart:
        yield Fact("gpu to gpu", f"no direct access between {', '.join(apart)}: they exchange through host memory")


def _gpu(number: int) -> Fact:
    name = f"gpu {number}"
    try:
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        square = torch.ones(256, 256, device=f"cuda:{number}")
        well = bool(((square @ square)[0, 0] == 256).item())
    except RuntimeError as error:  # a kernel that is missing for this GPU, a device that fell off the bus
        return Fact(name, f"cannot compute: {first_line(error)}", well=False)
    found = (
        f"{about.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free, compute capability {about.major}.{about.minor},"
        f" CUDA {torch.version.cuda}"
    )
    return Fact(name, found if well else f"{found}: computes a wrong product", well=well)


def _communication() -> Iterator[Fact]:
    backends = ["gloo"] * dist.is_gloo_available()
    if dist.is_nccl_available():
        backends.append(f"nccl {'.'.join(map(str, nccl.version()))}")
    yield Fact("communication", ", ".join(backends) or "none", well=bool(backends))
    if torch.cuda.device_count() and not dist.is_nccl_available():
        yield Fact("nccl", "missing from this torch, and several GPUs need it; install torch for CUDA", well=False)
    adapters = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    interfaces = [name for name, about in psutil.net_if_stats().items() if about.isup and name != "lo"]
    yield Fact("network", f"{', '.join(interfaces) or 'loopback alone'}; InfiniBand: {', '.join(adapters) or 'none'}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if adapters and locked != resource.RLIM_INFINITY:
        yield Fact(
            "locked memory",
            f"at most {locked // 1024} KiB, and InfiniBand pins its buffers; set it to unlimited (ulimit -l)",
            well=False,
        )


def _compilers() -> Iterator[Fact]:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    found = {"C++": compiler, "ninja": find_ninja() or None, "Python.h": headers or None}
    missing = [name for name, value in found.items() if not value]
    if missing:
        yield Fact(
            "compiler",
            f"missing: {', '.join(missing)}; train.compile=true and DeepSpeed's kernels compile at first use"
            " (apt-get install g++ python3-dev, pip install ninja)",
            well=False,
        )
    else:
        yield Fact("compiler", f"{_answer(str(compiler), '--version')}; ninja; Python.h")
    if torch.version.cuda:
        nvcc = _answer("nvcc", "--version") if shutil.which("nvcc") else "no nvcc"
        yield Fact("cuda toolkit", f"{nvcc}; DeepSpeed's CUDA kernels want the release of torch, {torch.version.cuda}")
    library = find_library("aio")
    yield Fact("libaio", library or "not found; parallel.offload.*=nvme needs it (apt-get install libaio-dev)")


def _shared_memory() -> Fact:
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return Fact("shared memory", f"{SHARED_MEMORY}: {error.strerror}; mount a tmpfs there", well=False)
    free = about.f_bavail * about.f_frsize
    text = f"{SHARED_MEMORY} has {free / GIB:.2f} GiB free"
    if free < LITTLE_SHARED_MEMORY:
        return Fact("shared memory", f"{text}; NCCL and loader processes need more: docker --shm-size=8g", well=False)
    return Fact("shared memory", text)


def _limits() -> Iterator[Fact]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        yield Fact("open files", f"at most {files}; many ranks on a node need more: ulimit -n 65536", well=False)


def _disk(folder: Path) -> Fact:
    place = existing(folder)
    free, speed = shutil.disk_usage(place).free, write_speed(place)
    text = f"{place} has {free / GIB:.1f} GiB free"
    if speed is None:
        return Fact("disk", f"{text}, and cannot be written; choose another train.run_dir", well=False)
    return Fact("disk", f"{text}, writes {speed / 1e9:.2f} GB/s")


def _slurm() -> Fact:
    if shutil.which("sbatch") is None:
        return Fact("slurm", "no sbatch; cluster=slurm submits from a login node")
    answer = _answer("sbatch", "--version")
    well = answer.startswith("slurm")
    return Fact("slurm", answer if well else f"{answer}; cluster=slurm cannot submit from here", well=well)


def _ray() -> Iterator[Fact]:
    if installed("ray") is None:
        return  # reported with the other packages
    try:
        address = find_cluster(None)
    except EnvironmentProblem as error:
        yield Fact("cluster (ray)", str(error), well=False)
        return
    found = f"one runs at {address}" if address else "none runs here; cluster=ray starts one for its run"
    yield Fact("cluster (ray)", found)


def _answer(*command: str) -> str:
    """The first line of a program's output; the last line for nvcc, which begins with its copyright."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {type(error).__name__}"
    lines = (done.stdout or done.stderr).strip().splitlines() or [f"{command[0]} says nothing"]
    return lines[-1 if command[0] == "nvcc" else 0]
