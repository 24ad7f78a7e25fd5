"""`memory-estimate estimate.explore=FILE.html`: every combination of a model on a cluster, on one page.

    memory-estimate model=llama3_1_8b cluster=8xh100 precision=bf16 estimate.explore=8b.html
    memory-estimate -m data.seq_len=2048,8192 optimizer=adamw,lion model=llama3_1_8b estimate.explore=8b.html

Layouts, micro-batches and recompute are those of `estimate.search`. -m lists the swept overrides; without it two
sequence lengths, optimizers and precisions are swept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import product

from configs.errors import EXIT_FINISHED, ConfigError
from configs.load import chosen_options, load_config
from configs.schema import Config
from trainer.estimate.estimate import planned_machine
from trainer.estimate.gate import EXIT_DOES_NOT_FIT
from trainer.estimate.search.explore import check_open, explore
from trainer.estimate.search.explore_page import Control, check_file, save_page
from trainer.estimate.search.render import REPLACED
from trainer.optim.table import usual
from trainer.plan.machine import find_machine

LONGER = 4
USUAL = {"optimizer": usual(), "precision": ("bf16", "fp32")}
"""Groups that are swept without -m, each together with the option of the command itself."""
QUIET_SECONDS, EVERY_SECONDS = 1.0, 5.0


def explore_layouts(runs: Sequence[Sequence[str]], *, config_dir: str | None) -> int:
    """Write the page. runs: the overrides, or for a sweep those of each configuration. Returns the exit code. Raises
    CookbookError."""
    first = load_config(runs[0], config_dir=config_dir)
    check_file(first)
    check_open(first)
    overrides, controls = _swept(runs) if len(runs) > 1 else _usual(runs[0], first, config_dir)
    configs = [
        load_config([*overrides, *chosen], config_dir=config_dir)
        for chosen in product(*(control.overrides for control in controls))
    ]
    machines = [planned_machine(config, find_machine({})) for config in configs]
    found = explore(configs, machines, _Said())
    size = save_page(found, controls, overrides, first)
    points = [point for each in found for point in each.points]
    fits, refused = (sum(map(bool, values)) for values in ([p.fits for p in points], [p.refused for p in points]))
    print(
        f"{first.estimate.explore}: {len(points):,} combinations, of which {fits:,} fit and {refused:,} are refused"
        f" ({size / 1e6:.2f} MB)"
    )
    return EXIT_FINISHED if fits else EXIT_DOES_NOT_FIT


def _swept(runs: Sequence[Sequence[str]]) -> tuple[list[str], list[Control]]:
    """The overrides that all runs share, and one control for each override with several values."""
    columns = [list(dict.fromkeys(column)) for column in zip(*runs, strict=True)]
    controls = [Control(values[0].partition("=")[0], tuple(values)) for values in columns if len(values) > 1]
    chosen = [control.key for control in controls if f"{control.key}=".startswith(REPLACED)]
    if chosen:
        raise ConfigError(
            *(
                f"{key}: estimate.explore has no control for it, and tries the values of layouts itself; give one value"
                " or none"
                for key in chosen
            )
        )
    return [values[0] for values in columns if len(values) == 1], controls


def _usual(overrides: Sequence[str], config: Config, config_dir: str | None) -> tuple[list[str], list[Control]]:
    """The default sweep, without -m, as far as the command allows it."""
    chosen = chosen_options(overrides, config_dir=config_dir)
    values = {group: [f"{group}={chosen[group]}"] for group in USUAL}
    for group, options in USUAL.items():
        for word in (f"{group}={option}" for option in options if option != chosen[group]):
            with suppress(ConfigError):
                load_config([*overrides, word], config_dir=config_dir)
                values[group].append(word)
    values = {"data.seq_len": [f"data.seq_len={config.data.seq_len * times}" for times in (1, LONGER)], **values}
    controls = [Control(key, tuple(each)) for key, each in values.items()]
    return [word for word in overrides if word.partition("=")[0] not in values], controls


class _Said:
    """Reports progress on standard error, if the work takes longer than a moment."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        spent = now - self.began
        if spent < QUIET_SECONDS or (now - self.said < EVERY_SECONDS and done < total and self.said > self.began):
            return
        self.said = now
        left = spent / done * (total - done)
        print(f"explored {done:,} of {total:,} combinations; about {left:.0f} s left", file=sys.stderr, flush=True)
