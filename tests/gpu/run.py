"""The work of a child of `tests.gpu.all`: for each kind of case, a function from the task to numbers.

The entry "failed" is a sentence: it says that the compared values differ too much.
"""

from __future__ import annotations

import fcntl
import gc
import gzip
import hashlib
import json
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from configs.load import load_config
from configs.schema import Config
from tests.benchmarks.overhead import by_hand, by_transformers, by_us
from tests.gpu.fake_rank import measure as measure_rank
from tests.support.balance import balance
from tests.support.cases import Trained, train
from tests.support.parity import COMMON, MIXTURES, MODELS, distance
from trainer.data.build import build_data
from trainer.engine import build_engine
from trainer.estimate.compose import STEPS
from trainer.estimate.estimate import estimate
from trainer.estimate.tracker import StorageTracker
from trainer.flops import Flops, mfu, model_flops, peak_flops
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime, join_world
from trainer.run.step import train_step

SHAPES = {**MODELS, **MIXTURES, "tall": [*MODELS["llama"], "model.config.vocab_size=2048"]}
"""tall: its embedding has more than 100,000 values, so its states can be paged."""
Task = dict[str, Any]
Numbers = dict[str, Any]
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "peft", "torchao", "triton", "numpy")
WARM = 3  # number of warm-up steps, which are not timed
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # variables that `join_world` leaves behind


def set_segments(task: Task) -> None:
    """Apply `cluster.expandable_segments`.

    The environment variable is too late: the fork server read it before the case was known.
    """
    if task["device"] == "cuda":
        wanted = "cluster.expandable_segments=false" not in task["case"]["words"]
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{wanted}")


def probe(task: Task) -> Numbers:
    """Describe the machine. Fails if CUDA does not work in a forked process."""
    numbers: Numbers = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            numbers[name] = version(name)
    if task["device"] == "cuda":
        torch.zeros(1, device="cuda").item()
        found = torch.cuda.get_device_properties(0)
        numbers |= {
            "gpu": found.name,
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
        }
        numbers |= {
            "cuda": torch.version.cuda,
            "driver": _smi("driver_version"),
            "used_before_mib": _smi("memory.used"),
        }
    return numbers


def predict(task: Task) -> Numbers:
    """The memory estimate for a case's overrides, computed on the CPU."""
    torch.set_num_threads(1)
    config, world = load_config(_words(task)), task["case"]["options"].get("world", 1)
    plan = make_plan(config, _machine(world))
    found = estimate(config, plan, found_gpu=task["gpu"])
    rank = found.of_rank(plan, task["case"]["options"].get("rank", 0))
    return {
        "allocated": rank.peak_allocated_bytes,
        "reserved": rank.peak_reserved_bytes,
        "device": rank.device_bytes,
        "reserved_most": rank.peak_reserved_most_bytes,
        "device_most": rank.device_most_bytes,
        "verdict": str(found.verdict),
    }


def parity(task: Task) -> Numbers:
    """Compare five steps on the device with the reference on the CPU, from the same weights.

    The option `by` names the compared quantities:
    all: losses, gradient norms and parameters.
    loss: losses and gradient norms.
    near: absolute differences of the losses.
    first: the first loss only, because each device's generator draws other adapters.

    Except with `first`, the loss must also fall.
    """
    torch.set_num_threads(4)
    options = task["case"]["options"]
    kernel = options.get("kernel")
    weights = _weights(task, options["model"])
    shared = [
        *COMMON,
        *SHAPES[options["model"]],
        "parallel=single",
        "precision=fp64",
        "train.steps=5",
        *weights,
    ]
    reference = _reference(task, [*shared, *options["against"]])
    with sdpa_kernel(SDPBackend[kernel]) if kernel and task["device"] == "cuda" else nullcontext():
        found = train([*shared, *_on_device(task), *task["case"]["words"]])
    apart = [abs(a - b) for a, b in zip(found.losses, reference.losses, strict=True)]
    by, limit = options["by"], options["limit"]
    numbers: Numbers = {"by": by, "limit": limit, "losses": found.losses, "reference": reference.losses}
    if by == "first":
        numbers["distance"] = apart[0] / abs(reference.losses[0])
    elif by == "near":
        numbers["distance"] = max(apart)
    else:
        far = distance(found, reference)
        numbers |= {"loss": far.loss, "grad_norm": far.grad_norm, "parameters": far.parameters}
        numbers["distance"] = far.largest if by == "all" else max(far.loss, far.grad_norm)
    if not numbers["distance"] <= limit:
        numbers["failed"] = f"distance {numbers['distance']:.2g}, the limit is {limit:g}"
    elif by != "first" and not found.losses[-1] < found.losses[0]:
        numbers["failed"] = f"did not learn: {found.losses}"
    return numbers


def memory(task: Task) -> Numbers:
    """Peak bytes of two steps of the real engine."""
    config, plan = _config_and_plan(task)
    tracker = StorageTracker() if task["device"] == "cpu" else nullcontext()
    with join_world(plan, timeout_minutes=5) as runtime, tracker:
        step = _stepper(config, plan, runtime)
        losses = [step() for _ in range(STEPS)]
        if isinstance(tracker, StorageTracker):
            return {"allocated": max(total for _, total in balance(tracker.events)), "losses": losses}
        return {**_peaks(), "losses": losses}


def fake(task: Task) -> Numbers:
    """Peak bytes of one rank of a simulated world."""
    options = task["case"]["options"]
    found = measure_rank(options["rank"], options["world"], _words(task))
    return {"allocated": found["measured_allocated_bytes"], "reserved": found["measured_reserved_bytes"]}


def speed(task: Task) -> Numbers:
    """Measure steps of this trainer's engine for `seconds` (an option), after warm-up steps."""
    config, plan = _config_and_plan(task)
    with join_world(plan, timeout_minutes=5) as runtime:
        begun = time.perf_counter()
        engine = build_engine(config, plan, runtime)
        step = _stepper(config, plan, runtime, engine)
        built = time.perf_counter()
        step()
        first = time.perf_counter() - built
        for _ in range(WARM - 1):
            step()
        seconds = _timed(step, task["case"]["options"].get("seconds", 8.0))
        flops = model_flops(engine.model, seq_len=config.data.seq_len)
        return {
            **_speed(config, plan, seconds, flops, task["gpu"]),
            "build_seconds": built - begun,
            "first_step_seconds": first,
            **(_peaks() if task["device"] == "cuda" else {}),
        }


def versus(task: Task) -> Numbers:
    """Time transformers' Trainer, a hand-written loop and this trainer, one after another, each with its own model."""
    config, plan = _config_and_plan(task)
    device = torch.device("cuda", 0) if task["device"] == "cuda" else torch.device("cpu")
    budget = task["case"]["options"].get("seconds", 6.0)
    with torch.device("meta"):
        flops = model_flops(
            AutoModelForCausalLM.from_config(build_hf_config(config.model)), seq_len=config.data.seq_len
        )
    found: dict[str, Numbers] = {}

    def contend(name: str, make: Callable[[], Callable[[int], float]]) -> None:
        run = make()
        one = run(WARM) and run(2) / 2
        steps = max(2, int(budget / one / 3))
        found[name] = _speed(config, plan, [run(steps) / steps for _ in range(3)], flops, task["gpu"])
        del run
        gc.collect()
        if task["device"] == "cuda":
            found[name] |= _peaks()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # There is no process group here: with one, the Trainer would wrap its model for data parallel.
    alone = Runtime(rank=0, local_rank=0, world_size=1, device=device)
    if not plan.fully_sharded:
        contend("transformers Trainer", lambda: by_transformers(config, plan, alone))
    with join_world(plan, timeout_minutes=5) as runtime:
        contend("hand-written loop", lambda: by_hand(config, plan, runtime))
        contend("this trainer", lambda: by_us(config, plan, runtime))
    return {"contenders": found}


def bandwidth(task: Task) -> Numbers:
    """GB/s of copies of 1 GiB, and TFLOP/s of a bf16 matmul."""
    size = 2**30 if task["device"] == "cuda" else 2**20
    host = torch.empty(size, dtype=torch.uint8).pin_memory()
    here, there = torch.empty_like(host, device="cuda"), torch.empty_like(host, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def per_second(work: Callable[[], object], amount: float) -> float:
        work()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            work()
        end.record()
        torch.cuda.synchronize()
        return 5 * amount / (begin.elapsed_time(end) / 1e3)

    return {
        "host_to_device_gb": per_second(lambda: here.copy_(host, non_blocking=True), size) / 1e9,
        "device_to_host_gb": per_second(lambda: host.copy_(here, non_blocking=True), size) / 1e9,
        "device_copy_gb": per_second(lambda: there.copy_(here), 2 * size) / 1e9,
        "bf16_tflops": per_second(lambda: a @ b, 2 * 8192**3) / 1e12,
    }


def run(task: Task) -> Numbers:
    """Run the trainer's own entry point, as a user would start it."""
    from trainer.__main__ import main

    folder = Path(task["work"]) / "runs" / task["case"]["options"]["into"]
    code = main([*_words(task), f"train.run_dir={folder}"])
    if code != 0:
        return {"failed": f"exit code {code}; see the log"}
    summary = json.loads((folder / "summary.json").read_text())
    numbers: Numbers = {key: summary[key] for key in ("loss_first", "loss_last", "tokens_per_second", "mfu")}
    numbers |= {key: summary["memory"][f"{key}_bytes"] for key in ("predicted_allocated", "measured_allocated")}
    if task["case"]["options"].get("resumed"):
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        numbers["steps"] = [line["step"] for line in steps if line["kind"] == "step"]
        if numbers["steps"] != list(range(1, 7)):
            numbers["failed"] = f"steps {numbers['steps']}: not resumed after step 4"
    return numbers


def trace(task: Task) -> Numbers:
    """Do a run with `profile=true`. Returns numbers from its trace, and its files."""
    numbers = run(task)
    folder = Path(task["work"]) / "runs" / task["case"]["options"]["into"] / "profile"
    numbers["files"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    for file in folder.iterdir():
        if file.stat().st_size < 12 * 2**20:
            _keep(file, task, "profile")
    for file in sorted(folder.glob("trace-rank0*.json.gz"))[:1]:
        events = [event for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if "dur" in event]
        steps = [event["dur"] for event in events if str(event.get("name", "")).startswith("step ")]
        kernels = Counter[str]()
        for event in events:
            if event.get("cat") == "kernel":
                kernels[event["name"][:80]] += event["dur"]
        if kernels and steps:
            numbers["gpu_busy"] = sum(kernels.values()) / sum(steps[: max(1, len(steps) // 2)])
            numbers["kernels"] = {name: total / sum(kernels.values()) for name, total in kernels.most_common(8)}
    return numbers


def compare(task: Task) -> Numbers:
    """Run `python -m launch compare` on the runs done so far."""
    from launch.__main__ import main

    folder = Path(task["work"]) / "runs" / task["case"]["options"]["into"]
    code = main(["compare", str(folder)])
    for file in folder.glob("comparison*"):
        _keep(file, task, "compared")
    return {"runs": sorted(file.name for file in folder.iterdir() if file.is_dir())} | (
        {"failed": f"exit code {code}; see the log"} if code else {}
    )


CALLS: dict[str, Callable[[Task], Numbers]] = {
    function.__name__: function
    for function in (probe, parity, memory, fake, speed, versus, bandwidth, run, trace, compare)
}


def _machine(world: int = 1) -> Machine:
    return Machine(gpus=world, world_size=world, local_world_size=world)


def _on_device(task: Task) -> list[str]:
    return [f"cluster.device={task['device']}", "cluster.gpus_per_node=1"]


def _words(task: Task) -> list[str]:
    device = _on_device(task)[: 1 if "world" in task["case"]["options"] else 2]
    quiet = ["logging.progress=off", "train.eval_samples=8", "scheduler=constant"]
    return ["data=synthetic", *quiet, *task["case"]["words"], *device, f"data.cache_dir={task['work']}/cache"]


def _config_and_plan(task: Task) -> tuple[Config, Plan]:
    config = load_config([*_words(task), "train.steps=1000000"])
    return config, make_plan(config, _machine())


def _stepper(config: Config, plan: Plan, runtime: Runtime, engine: Any = None) -> Callable[[], float]:
    """A function that does one step and returns its loss."""
    vocabulary = build_hf_config(config.model).vocab_size
    batches = build_data(config, plan, data_rank=0, vocab_size=vocabulary).steps()
    engine = engine or build_engine(config, plan, runtime)
    return lambda: train_step(engine, next(batches), plan, runtime, config.optimizer.lr).loss


def _timed(step: Callable[[], float], budget: float) -> list[float]:
    """Seconds of each step. A step ends by reading its loss, which waits for the GPU."""
    seconds: list[float] = []
    while sum(seconds) < budget and len(seconds) < 200:
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _speed(config: Config, plan: Plan, seconds: Sequence[float], flops: Flops, gpu: str | None) -> Numbers:
    median = statistics.median(seconds)
    tokens, peak = plan.batch.tokens / median, peak_flops(config, plan, gpu, flops)
    used = mfu(tokens, flops_per_token=flops.step(config), world_size=1, peak_flops=peak) if peak else None
    return {"step_seconds": median, "steps": len(seconds), "tokens_per_second": tokens, "mfu": used}


def _peaks() -> Numbers:
    """Bytes of torch's allocator, and bytes in use on the whole card (from nvidia-smi if available)."""
    free, total = torch.cuda.mem_get_info()
    used = _smi("memory.used")
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": int(used) * 2**20 if used and used.isdigit() else total - free,
        "given_away": total - free,
    }


def _smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def _keep(file: Path, task: Task, folder: str) -> None:
    target = Path(task["out"]) / folder
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target / file.name)


def _weights(task: Task, model: str) -> list[str]:
    """Overrides that load weights from a folder, because each device's generator draws others."""
    folder = Path(task["work"]) / "weights" / model
    with _alone(folder):
        if not (folder / "config.json").exists():
            torch.manual_seed(0)
            plain = AutoModelForCausalLM.from_config(build_hf_config(load_config([*COMMON, *SHAPES[model]]).model))
            plain.save_pretrained(folder)
    return [f"model.path={folder}", "model.weights=pretrained", "data.tokenizer=bytes"]


def _reference(task: Task, words: list[str]) -> Trained:
    """Train the reference on the CPU, once for all cases that share it."""
    words = [*words, "cluster.device=cpu", "cluster.gpus_per_node=1"]
    file = Path(task["work"]) / "references" / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:16]}.pickle"
    with _alone(file):
        if not file.exists():
            file.write_bytes(pickle.dumps(train(words)))
            for name in LAUNCHER:  # the next run starts afresh
                os.environ.pop(name, None)
        return pickle.loads(file.read_bytes())


@contextmanager
def _alone(what: Path) -> Iterator[None]:
    """Lock `what` so that only one of several concurrent cases creates it."""
    what.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
