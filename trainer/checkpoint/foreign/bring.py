"""`train.resume=SOURCE` of a foreign checkpoint: rank 0 converts it into the run folder, the others wait.

It is compared before it is converted, and it is not committed here: a refused start, at the latest when the engine
loads it, leaves nothing from which a later start would continue.

After each tensor all ranks meet, because the conversion of a large model takes longer than a rank may stall.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import Config
from trainer.checkpoint.catalog import partial_of, step_name
from trainer.checkpoint.foreign.convert import convert, progress_of
from trainer.checkpoint.foreign.table import open_foreign, recognise
from trainer.checkpoint.progress import check_same
from trainer.model.build import build_hf_config
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime
from trainer.process.watchdog import at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def bring(
    place: Path,
    checkpoints: Path,
    config: Config,
    plan: Plan,
    runtime: Runtime,
    *,
    identity: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Path]:
    """The checkpoint made from a foreign one, below the run's `checkpoints`, not yet committed; None if `place` holds
    no known kind. identity: the run's. A collective. Raises CookbookError on every rank."""
    found = runtime.agree(lambda: runtime.is_main and recognise(place) is not None)
    if not runtime.max(found)[0]:
        return []
    moving = _convert(place, checkpoints, config, plan, identity, tokenizer) if runtime.is_main else None
    made = ""
    while word := runtime.broadcast(runtime.agree(lambda: next(moving, "") if moving is not None else "")):
        at("importing a checkpoint")
        made = word
    return [Path(made)]


def _convert(
    place: Path,
    checkpoints: Path,
    config: Config,
    plan: Plan,
    identity: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[str]:
    """Each key, and finally the checkpoint's folder."""
    folder, source = open_foreign(place, build_hf_config(config.model))
    record = source.record
    target = checkpoints / step_name(record.step)
    progress = progress_of(record, record.step * plan.batch.global_batch_size)
    check_same(progress, identity, source=folder, global_batch_size=plan.batch.global_batch_size)
    if record.adapters:  # their meaning depends on settings that only this run has
        said = {key: value for key, value in identity.items() if key.startswith("tuning.")}
        progress = replace(progress, identity=progress.identity | said)
    yield from convert(source, target, progress, place=folder, tokenizer=tokenizer)
    if record.samples is None:
        log.warning(
            "%s: does not say how many samples it has seen; the data go on at sample %d", folder, progress.samples
        )
    for note in record.notes:
        log.warning("%s: %s", folder, note)
    log.warning("imported   %s, step %d, from %s into %s", record.kind, record.step, folder, target)
    yield str(partial_of(target))
