"""An adapter merged into its base: a whole model, as a Hugging Face folder, without a GPU.

python -m trainer.checkpoint merge ADAPTER OUT               a folder that peft or this trainer has written
python -m trainer.checkpoint merge RUN_DIR OUT --base BASE   the newest whole checkpoint of a run, upon a base elsewhere

peft does the arithmetic, in float32 and on the whole base in host memory; the sum is rounded to the dtype once. Except
for that rounding the model's results do not change; an adapter trained on a 4-bit base is merged into the unquantized
base.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.adapter_folder import CONFIG, is_adapter_folder, read_adapter
from configs.errors import CheckpointMismatch, DataError, EnvironmentProblem, first_line
from trainer import linear
from trainer.checkpoint.export import export
from trainer.model.fitting import quiet
from trainer.process.disks import readable, refused

log = logging.getLogger(__name__)


def merge(source: Path, target: Path, *, dtype: torch.dtype, base: str | None = None) -> str:
    """Write the base of an adapter with the adapter merged into it to `target`. Returns the names of both.

    source: an adapter's folder, a run or a checkpoint. base: a folder or hub id; None: the base that the adapter names.
    Raises DataError, CheckpointMismatch or CheckpointDamaged for unreadable input, EnvironmentProblem for a target that
    exists or cannot be written.
    """
    with readable(target):
        exists = target.exists()
    if exists:
        raise EnvironmentProblem(f"{target}: exists; choose another folder")
    with _adapter(source) as folder:
        found = read_adapter(str(folder), str(source))
        if (kind := linear.ours(found.fields)) is not None:
            raise DataError(f"{source}: {kind.UNMERGED}")
        base = base or found.base
        if base is None:
            raise DataError(f"{source}: its adapter does not name the model that it was trained upon; give --base BASE")
        if is_adapter_folder(base):
            raise DataError(f"{base}: is an adapter too; merge it into its own model first, and give that as --base")
        model = _merged(folder, base, source)
        with refused(target, lambda why: _not_written(target, why)):
            _write(model.to(dtype), folder, base, target)
    return f"the adapter of {source} in {base}"


@contextmanager
def _adapter(source: Path) -> Iterator[Path]:
    """The folder of an adapter: the source, the finished model of a run, or an export of a checkpoint."""
    if is_adapter_folder(str(source)):
        yield source
        return
    with TemporaryDirectory() as folder:
        made = Path(folder) / "adapter"
        export(source, made, dtype=torch.float32)
        if not (made / CONFIG).is_file():
            raise CheckpointMismatch(f"{source}: trained the whole model, so there is no adapter to merge; use export")
        yield made


def _merged(folder: Path, base: str, source: Path) -> Any:
    from peft import PeftModel

    try:
        with quiet(), warnings.catch_warnings():
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            warnings.simplefilter("ignore")  # of peft, about names that transformers has changed
            return PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    except Exception as error:  # of transformers for the base, of peft for a mismatch
        raise DataError(
            f"{source}: cannot be merged into {base} ({first_line(error)}); give the model that it was trained upon"
        ) from None


def _write(model: Any, folder: Path, base: str, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    for place in (str(folder), base):
        try:
            AutoTokenizer.from_pretrained(place).save_pretrained(partial)
            break
        except Exception as error:  # each kind of tokenizer fails in its own way
            log.warning("%s: its tokenizer cannot be read (%s)", place, first_line(error))
    partial.rename(target)


def _not_written(target: Path, why: str) -> EnvironmentProblem:
    shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
    return EnvironmentProblem(f"{target}: cannot be written ({why}); make room there, or choose another folder")
