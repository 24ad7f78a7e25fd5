"""`cookbook generate`: a trained model writes text.

    cookbook generate runs/demo                        the newest model of a run, on its own
    cookbook generate runs/demo "def main(" --tokens 80
    cookbook generate runs/demo/checkpoints/step-00000100 -    the prompt is read from standard input
    cookbook generate runs/demo --initial              the weights that the run began with, for comparison

SOURCE is the folder of a run, of one checkpoint, of a Hugging Face model or of an adapter: `trainer.generation`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.entry_point import Parser
from configs.errors import EXIT_FINISHED, ConfigError
from configs.output import delivered
from trainer.process.answering import answered


def main(argv: Sequence[str] | None = None) -> int:
    """Generate text. Returns the exit code: 0, 1 for a damaged checkpoint, 2 for wrong arguments or an unreadable
    folder."""
    return answered(lambda: _generate(_parser().parse_intermixed_args(argv)))


def _generate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    # These imports take seconds, which `--help` and a misspelt argument need not wait for.
    from trainer.generation import Request, write

    asked: dict[str, Any] = {**vars(arguments), "prompt": prompt}
    write(Request(**asked))
    return delivered(EXIT_FINISHED)


def _parser() -> Parser:
    parser = Parser(prog="cookbook generate", description="Let a trained model write, as it goes.")
    parser.add_argument("source", type=Path, help="folder of a run, a checkpoint, a Hugging Face model or an adapter")
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; - reads standard input")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the likeliest tokens, this share (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among tokens (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message in the model's template")
    parser.add_argument("--initial", action="store_true", help="the weights that the run began with")
    parser.add_argument("--base", help="folder or hub id of the model that an adapter belongs to")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU where there is one)")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError, with all problems at once."""
    problems = [
        f"--{name}={value}: {rule}"
        for name, value, bad, rule in (
            ("tokens", arguments.tokens, arguments.tokens < 1, "must be at least 1"),
            (
                "temperature",
                arguments.temperature,
                arguments.temperature != 0 and not 1e-3 <= arguments.temperature < float("inf"),
                "must be 0, or 0.001 or more",
            ),
            ("top-p", arguments.top_p, not 0 < arguments.top_p <= 1, "must be above 0 and at most 1"),
            ("seed", arguments.seed, not 0 <= arguments.seed < 2**63, "must be 0 or more and less than 2^63"),
        )
        if bad
    ]
    if not arguments.source.exists():
        problems.append(f"{arguments.source}: no such folder; give RUN_DIR, a checkpoint, a model or an adapter")
    if problems:
        raise ConfigError(*problems)


if __name__ == "__main__":
    sys.exit(main())
