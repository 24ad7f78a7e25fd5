"""Runs all checks that need a GPU, on one GPU, within a given number of minutes.

    python -m tests.gpu.all --minutes 8                 a machine with one GPU; nothing has to be installed or fetched
    python -m tests.gpu.all --minutes 1 --device cpu    the same script with tiny shapes
    python -m tests.gpu.write gpu-results/results.json  puts the tables into the docs

This process does not import torch. A fork server has imported the libraries but has no CUDA context. Every case is a
separate child, so a crash, a hang or a lack of memory is a result. Small cases share the GPU and the others have it
alone, while predictions are computed on the CPU. Cases start in order of importance (`catalogue`). After each case all
results so far are written to DIR/results.json and DIR/results.md. The logs of the cases are in DIR/logs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.gpu.catalogue import PROBE, Case, cases
from tests.gpu.child import LEVEL, LEVELS, begin
from tests.gpu.report import markdown

ROOT = Path(__file__).parents[2]
LANES = 4  # number of small cases that share the GPU
SHORTEST = 3.0  # seconds; nothing starts if less time is left
Result = dict[str, Any]


@dataclass(kw_only=True)
class Job:
    """A process that runs a case or its prediction."""

    case: Case
    predicts: bool
    process: BaseProcess
    file: Path
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Starts jobs when they may start, kills jobs that take too long, and writes the results so far."""

    def __init__(self, chosen: Sequence[Case], *, device: str, folder: Path, deadline: float) -> None:
        self.device, self.folder, self.deadline = device, folder, deadline
        self.begun = time.monotonic()
        self.context = multiprocessing.get_context("forkserver")
        self.waiting = list(chosen)
        self.to_predict: list[Case] = [case for case in chosen if case.predicted]
        self.running: list[Job] = []
        self.results: dict[str, Result] = {case.key: _result(case, "not reached") for case in chosen}
        self.machine: dict[str, Any] = {}
        # Traces take one core each; leave the other cores to the timed case.
        self.predictors = max(1, (os.cpu_count() or 2) * 3 // 4)
        self.work = tempfile.TemporaryDirectory(prefix="gpu-all-", ignore_cleanup_errors=True)
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Run all cases, or as many as there is time for."""
        try:
            if self._probe():
                while self._left() > 0 and (self.waiting or self.to_predict or self.running):
                    self._reap()
                    self._start_cases()
                    self._start_predictions()
                    time.sleep(0.02)
        finally:
            for job in self.running:
                self._kill(job)
                self._record(job, _read(job.file), "out of time")
            self.write()
            self.work.cleanup()

    def _probe(self) -> bool:
        """Identify the machine. Returns whether a probe case passed.

        The fork server must not have initialized CUDA, so after a failure it is restarted with fewer libraries.
        """
        os.environ["TESTS_GPU_DEVICE"] = self.device
        for level in LEVELS:
            os.environ[LEVEL] = level
            self.context.set_forkserver_preload(["tests.gpu.preload"])
            job = self._start(PROBE, predicts=False)
            while job.process.is_alive() and self._left() > 0 and not self._late(job):
                time.sleep(0.02)
            self._kill(job)
            found = _read(job.file)
            if found.get("status") == "passed":
                self.machine = {**found["numbers"], "preloaded": level, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
                self.write()
                print(f"{self._seconds():6.1f} s  {_in_words(self.machine)}", flush=True)
                return True
            print(f"{self._seconds():6.1f} s  {level}: {found.get('note', 'no answer')}", file=sys.stderr, flush=True)
            multiprocessing.forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
        return False

    def _start_cases(self) -> None:
        on_gpu = [job for job in self.running if not job.predicts]
        while self.waiting and self._left() > SHORTEST:
            if any(not job.case.shared for job in on_gpu) or len(on_gpu) >= LANES:
                return
            if on_gpu and not self.waiting[0].shared:
                return
            on_gpu.append(self._start(self.waiting.pop(0), predicts=False))
            self.running.append(on_gpu[-1])

    def _start_predictions(self) -> None:
        timed = any(job.case.part == "speed" and not job.predicts for job in self.running)
        busy = sum(job.predicts for job in self.running)
        while self.to_predict and not timed and busy < self.predictors and self._left() > SHORTEST:
            self.running.append(self._start(self.to_predict.pop(0), predicts=True))
            busy += 1

    def _start(self, case: Case, *, predicts: bool) -> Job:
        name = (
            f"{case.key}{'.predicted' if predicts else ''}".replace("/", "-")
            .replace(" ", "_")
            .replace(":", "")
            .replace(",", "")
        )
        file = Path(self.work.name) / f"{name}.json"
        task = {
            "case": asdict(case),
            "predicts": predicts,
            "device": self.device,
            "work": self.work.name,
            "out": str(self.folder),
            "gpu": self.machine.get("gpu"),
        }
        log = self.folder / "logs" / f"{name}.log"
        process = self.context.Process(target=begin, args=(json.dumps(task), str(file), str(log)))
        process.start()
        return Job(case=case, predicts=predicts, process=process, file=file)

    def _reap(self) -> None:
        for job in list(self.running):
            late = self._late(job)
            if job.process.is_alive() and not late:
                continue
            self._kill(job)
            self.running.remove(job)
            self._record(
                job, _read(job.file), "took too long" if late else f"crashed (exit code {job.process.exitcode})"
            )

    def _late(self, job: Job) -> bool:
        return time.monotonic() - job.started > job.case.limit * (2 if job.predicts else 1)

    def _kill(self, job: Job) -> None:
        """Kill the child and the processes that it started (compilers)."""
        with suppress(ProcessLookupError, PermissionError):
            if job.process.pid is not None and job.process.is_alive():
                os.killpg(job.process.pid, signal.SIGKILL)
        job.process.join(timeout=10)

    def _record(self, job: Job, found: Result, otherwise: str) -> None:
        """Record the result of a job.

        found: result that the child wrote; empty if it wrote none.
        otherwise: status if the child wrote none; for a prediction, the note.
        """
        result = self.results[job.case.key]
        if job.predicts:
            result["predicted"] = found.get("numbers") or {"note": found.get("note") or otherwise}
        else:
            result.update({"status": otherwise, **found, "seconds": round(time.monotonic() - job.started, 2)})
            short = " ".join(str(result.get("note") or "").split())[:150]
            print(f"{self._seconds():6.1f} s  {result['status']:13} {job.case.key}  {short}", flush=True)
        self.write()

    def write(self) -> None:
        """Write results.json and results.md atomically."""
        found = {
            "machine": self.machine,
            "device": self.device,
            "minutes": round((time.monotonic() - self.begun) / 60, 2),
            "results": list(self.results.values()),
        }
        for name, text in (("results.json", json.dumps(found, indent=1)), ("results.md", markdown(found))):
            part = self.folder / f".{name}"
            part.write_text(text)
            part.replace(self.folder / name)

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _seconds(self) -> float:
        return time.monotonic() - self.begun


def _result(case: Case, status: str) -> Result:
    return {"name": case.name, "part": case.part, "status": status, "words": " ".join(case.words), "numbers": {}}


def _read(file: Path) -> Result:
    with suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return {}


def _in_words(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if isinstance(value, str))


def unpacked(wheels: Path, folder: Path) -> Iterator[str]:
    """Unpack all wheels into one folder and yield it for sys.path. A wheel is an archive of the installed files."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    if found:
        yield str(folder)


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.all", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="everything is over by then")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--only", default="", help="cases whose part or name contains this")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="packages that are not installed here")
    arguments = parser.parse_args(argv)
    chosen = [case for case in cases(arguments.device) if arguments.only in case.key]
    if not chosen:
        print(f"--only {arguments.only}: no case has this in its name", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-wheels-", ignore_cleanup_errors=True) as site:
        added = [str(ROOT), *unpacked(arguments.wheels, Path(site))]
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([*added, *([path] if path else [])])
        sys.path[:0] = added[1:]
        # Counting devices through NVML creates no CUDA context, which would not survive a fork.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0" if arguments.device == "cuda" else "")
        os.environ["HF_HUB_OFFLINE"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
        # Leave time to kill children and to write the results.
        deadline = begun + 60 * arguments.minutes - 1.5
        runner = Runner(chosen, device=arguments.device, folder=arguments.out.absolute(), deadline=deadline)
        runner.run()
    print(f"\n{arguments.out}/results.json and results.md; python -m tests.gpu.write {arguments.out}/results.json")
    print((arguments.out / "results.md").read_text())
    return 0 if runner.machine else 1


if __name__ == "__main__":
    sys.exit(main())
