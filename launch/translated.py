"""Files of other trainers as a configuration of this one, completed with values that only the model determines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from configs.errors import CookbookError, PlanError
from configs.foreign import Fate
from configs.imports import deepspeed
from configs.imports.combine import Imported, has_model, import_files
from configs.imports.write import as_config
from configs.load import usual
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.model_fields import config_fields, sizes

SPARED = (
    "parallel.deepspeed.",
    "parallel.fsdp.",
    "parallel.offload.pin_memory",
    "parallel.offload.nvme_path",
    "optimizer.paged",
    "optimizer.implementation",
    "precision.loss_scale",
    "train.compile",
    "data.packing",
)
"""Keys that affect speed and cost (text is packed in any case). If another setting makes the run ignore one of them, it
is left out and reported; every other refusal of the plan is for a person to decide."""
GPUS = 8  # per node, if no file and no override gives it


def translate(files: Sequence[str], overrides: Sequence[str], *, config_dir: str | None) -> Imported:
    """Like `import_files`, and computes the values that transformers' Trainer derives from the model. Raises
    CookbookError."""
    made = import_files(files, overrides, config_dir=config_dir)
    beside = any("training_arguments" in read.format.SECTIONS for read in made.read)
    if beside and has_model(made) and deepspeed.automatic(made.fields):
        try:
            hidden = sizes(config_fields(as_config(made))).hidden
        except CookbookError:  # a folder or hub id that is not here: the sizes are computed from the parameters
            return made
        if hidden is not None:
            deepspeed.fill(made.fields, made.settings, hidden)
            deepspeed.leave_unread(made.fields, made.settings, made.compute)
    while unread := dict(_unread(made)):
        for key, rule in unread.items():
            _leave_out(made, key, rule)
    return made


def _unread(made: Imported) -> Iterator[tuple[str, str]]:
    """Keys of a file that the plan refuses next to the others, each with its rule. The check needs no model."""
    try:
        config = as_config(made)
        gpus = config.cluster.gpus_per_node or GPUS
        make_plan(replace(config, model=usual()[0].model), Machine(gpus=gpus))
    except PlanError as error:
        given = {key for each in made.fields for key in each.settings}
        for problem in error.problems:
            head, _, rule = problem.partition(": ")
            key = head.partition("=")[0]
            if key in given and key.startswith(SPARED):
                yield key, rule.rpartition("; ")[0] or rule
    except CookbookError:  # of another kind: running the experiment reports it better
        return


def _leave_out(made: Imported, key: str, rule: str) -> None:
    made.settings.pop(key, None)
    for each in made.fields:
        if key in each.settings:
            del each.settings[key]
            each.why = f"{key} is left out: {rule}" if each.settings else rule
            each.fate = each.fate if each.settings else Fate.lost
