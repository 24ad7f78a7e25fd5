"""Runs one case in its own process. Its output goes to a log and its result to a file, whatever happens.

It does not import torch, because `tests.gpu.all` imports `begin` and must not load torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LEVEL = "TESTS_GPU_PRELOAD"
LEVELS = ("all", "without deepspeed", "nothing")


class Skipped(Exception):
    """The case cannot run on this machine."""


def begin(text: str, file: str, log: str) -> None:
    """Run a task and write {status, numbers, note}. A failed comparison, an error and a lack of memory are results too.

    text: task, as JSON.
    file: path of the result.
    log: path of the log.
    """
    os.setsid()  # so that processes of this child can be killed with it
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    task = json.loads(text)
    started = time.monotonic()
    result: dict[str, Any] = {"status": "failed", "numbers": {}, "note": None}
    try:
        if not _installed(task["case"]["needs"]):
            raise Skipped(f"needs {task['case']['needs']}, which is not installed")
        module = import_module("tests.gpu.run")
        module.set_segments(task)
        numbers = module.predict(task) if task["predicts"] else module.CALLS[task["case"]["call"]](task)
        result["note"] = numbers.pop("failed", None)
        result.update(status="failed" if result["note"] else "passed", numbers=numbers)
    except Skipped as reason:
        result.update(status="skipped", note=str(reason))
    except BaseException as error:
        traceback.print_exc()
        result.update(_of(error))
    result["child_seconds"] = round(time.monotonic() - started, 2)
    part = Path(f"{file}.part")
    part.write_text(json.dumps(result))
    part.replace(file)
    sys.stdout.flush()
    sys.stderr.flush()
    # Clean-up by libraries at exit (communicators, compilers) can take seconds, or hang.
    os._exit(0)


def _installed(distribution: str) -> bool:
    if distribution:
        try:
            version(distribution)
        except PackageNotFoundError:
            return False
    return True


def _of(error: BaseException) -> dict[str, Any]:
    kind, text = type(error).__name__, " ".join(str(error).split())
    if "OutOfMemory" in kind or "out of memory" in text:
        return {"status": "out of memory", "note": text[:300]}
    return {"note": f"{kind}: {text[:600]}"}
