"""Files of other trainers as a configuration of this one, with what only the model can say."""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import CookbookError
from configs.imports import deepspeed
from configs.imports.combine import Imported, has_model, import_files
from configs.imports.write import as_config
from trainer.plan.model_fields import config_fields, sizes


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
    return made
