"""Files of other trainers as a configuration of this one, with what only the model can say."""

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
"""Keys that change how fast a run is and what it takes (text is packed in any case). One of them that the run of the
other settings would not read is left out, and said; whatever else the plan refuses is for a person to decide."""
GPUS = 8  # of a node, where no file and no override says it


def translate(files: Sequence[str], overrides: Sequence[str], *, config_dir: str | None) -> Imported:
    """As `import_files`; what transformers' Trainer computes from the model is computed. Raises CookbookError."""
    made = import_files(files, overrides, config_dir=config_dir)
    beside = any("training_arguments" in read.format.SECTIONS for read in made.read)
    if beside and has_model(made) and deepspeed.automatic(made.fields):
        try:
            hidden = sizes(config_fields(as_config(made))).hidden
        except CookbookError:  # a folder or hub id that is not here: the sizes stay computed from the parameters
            return made
        if hidden is not None:
            deepspeed.fill(made.fields, made.settings, hidden)
            deepspeed.leave_unread(made.fields, made.settings, made.compute)
    while unread := dict(_unread(made)):
        for key, rule in unread.items():
            _leave_out(made, key, rule)
    return made


def _unread(made: Imported) -> Iterator[tuple[str, str]]:
    """Keys of a file that the plan refuses beside the others, each with its rule. The model has no part in that, and
    need not be here."""
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
    except CookbookError:  # of another kind, which whoever runs the experiment tells better
        return


def _leave_out(made: Imported, key: str, rule: str) -> None:
    made.settings.pop(key, None)
    for each in made.fields:
        if key in each.settings:
            del each.settings[key]
            each.why = f"{key} is left out: {rule}" if each.settings else rule
            each.fate = each.fate if each.settings else Fate.lost
