"""Every type that transformers registers for causal language models, tiny, under every layout.

    python -m tests.zoo                        all; what has been seen with these versions is not run again
    python -m tests.zoo llama mixtral          some types
    python -m tests.zoo --layouts fsdp tensor  some layouts
    python -m tests.zoo --table                print what has been seen, as Markdown

Each case trains three steps in float64 and is held against one process. It may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.cases import Trained
from tests.support.harness import RankFailed, run_ranks
from tests.support.parity import COMMON, distance
from tests.zoo.case import attempt
from tests.zoo.tiny import tiny, types

ROOT = Path(__file__).parents[2]
LIMIT = 1e-4
"""Of losses and gradient norms. Some types compute parts in float32 whatever the precision, which Adam magnifies in the
parameters; what is wrong is further away."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (2, ("parallel=ddp",)),
    "fsdp": (2, ("parallel=fsdp",)),
    "tensor": (2, ("parallel=tensor",)),
    "sequence": (2, ("parallel=tensor", "parallel.sequence_parallel=true")),
    "pipeline": (2, ("parallel=pipeline", "train.gradient_accumulation_steps=2")),
    "context": (2, ("parallel=context",)),
    "recompute": (1, ("train.activation_checkpointing=full",)),
    "chunked loss": (1, ("train.chunked_loss=true",)),
}
"""Processes, and overrides. `single` comes first: the others are held against it."""
Verdict = dict[str, Any]


def words(folder: Path) -> list[str]:
    own = ["train.steps=3", "parallel=single", "precision=fp64", f"model.path={folder}", "model.weights=random"]
    return [*COMMON, *own, "data.tokenizer=bytes", "estimate.gate=off"]


def judge(folder: Path, layout: str) -> tuple[Verdict, Trained | None]:
    """One case: its verdict, and what was trained if it ran."""
    processes, more = (1, ()) if layout == "single" else LAYOUTS[layout]
    try:
        found = run_ranks(processes, attempt, [*words(folder), *more], timeout=240)[0]
    except RankFailed as failed:
        return {"verdict": "crash", "note": str(failed).strip().splitlines()[-1][:200]}, None
    if isinstance(found, str):
        return {"verdict": "refused", "note": found[:300]}, None
    return {"verdict": "ok"}, found


def visit(model_type: str, layouts: Sequence[str], known: dict[str, Verdict]) -> None:
    """Fill `known` for one type."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            tiny(model_type).save_pretrained(folder)
        except Exception as error:
            known["single"] = {"verdict": "no config", "note": f"{type(error).__name__}: {str(error)[:200]}"}
            return
        verdict, reference = judge(folder, "single")
        if reference is not None and not reference.losses[-1] < reference.losses[0]:
            verdict = {"verdict": "differs", "note": f"did not learn: {reference.losses}"}
        known["single"] = verdict
        for layout in layouts if reference is not None else ():
            if layout in known:
                continue
            verdict, found = judge(folder, layout)
            if found is not None and reference is not None:
                apart = distance(found, reference)
                far = max(apart.loss, apart.grad_norm)
                verdict |= {"distance": far}
                if not far <= LIMIT:
                    verdict |= {"verdict": "differs", "note": f"{far:.1g} from one process"}
            known[layout] = verdict


def versions() -> str:
    names = ("torch", "transformers")
    return ", ".join(f"{name} {version(name)}" for name in names) + f", Python {platform.python_version()}"


def render(seen: dict[str, dict[str, Verdict]]) -> str:
    columns = ["single", *LAYOUTS]
    lines = ["| type | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for model_type in sorted(seen):
        cells = [seen[model_type].get(column, {}).get("verdict", "") for column in columns]
        lines.append(f"| `{model_type}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="some types; all without")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--again", action="store_true", help="also what has been seen")
    parser.add_argument("--table", action="store_true", help="print what has been seen")
    arguments = parser.parse_args(argv)
    file = ROOT / "build" / "zoo" / f"{versions().replace(', ', '-').replace(' ', '')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    seen: dict[str, dict[str, Verdict]] = json.loads(file.read_text()) if file.exists() else {}
    if arguments.table:
        print(render(seen))
        return 0
    for model_type in arguments.types or types():
        known = {} if arguments.again else seen.get(model_type, {})
        if all(layout in known for layout in arguments.layouts):
            continue
        visit(model_type, arguments.layouts, known)
        seen[model_type] = known
        file.write_text(json.dumps(seen, indent=1))
        print(model_type, "  ".join(f"{layout}: {row['verdict']}" for layout, row in known.items()), flush=True)
        for layout, row in known.items():
            if row["verdict"] not in ("ok",):
                print(f"    {layout}: {row.get('note')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
