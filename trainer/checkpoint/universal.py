"""Exports a checkpoint as a universal one, from which DeepSpeed continues under ZeRO 1, 2 or 3 and any number of ranks.

python -m trainer.checkpoint export RUN_DIR OUT --format deepspeed

    OUT/latest_universal
    OUT/global_step100/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt    one tensor in memory at a time
                       zero/optimizer_state.pt
                       [zero_pp_rank_0_]mp_rank_00_model_states.pt    the same for stages 1 and 2, and for stage 3

The resuming script has its own optimizer: the groups here contain only the learning rate of the next update. The step
is stored under the names that schedulers use, DeepSpeed's own and torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.outgoing import STATES, outgoing
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.tensors import TensorReader
from trainer.engine.deepspeed.setup import LOWEST_VERSION

GROUPS = 64
"""More groups than an optimizer has: DeepSpeed reads the parameters of as many groups as are listed."""


def export_universal(source: Path, target: Path) -> Path:
    """Write the checkpoint, or the newest whole one of a run, to `target`. Returns the checkpoint. Raises as
    `outgoing` does."""
    with outgoing(source, target, what="a universal checkpoint") as it:
        tag = f"global_step{it.progress.step}"
        _write(it.partial / tag, it.saved, it.names, it.progress, it.next_lr())
        (it.partial / "latest_universal").write_text(tag)
    return it.folder


def _write(folder: Path, saved: TensorReader, names: list[str], progress: Progress, lr: float | None) -> None:
    step = torch.tensor(float(progress.engine.optimizer_steps))
    for name in names:
        place = folder / "zero" / name
        place.mkdir(parents=True)
        for file, kind in (("fp32", "model"), *((kind, kind) for kind in STATES)):
            torch.save({"param": saved.read(f"{kind}/{name}").float(), "cat_dim": 0}, place / f"{file}.pt")
        torch.save(step, place / "step.pt")
    group: dict[str, Any] = {} if lr is None else {"lr": lr}
    common = {
        "ds_version": LOWEST_VERSION,
        "param_groups": [{**group, "params": [number]} for number in range(GROUPS)],
        # The place where stage 3 looks for both.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{**group, "params": [0]}]},
    }
    torch.save(common, folder / "zero" / "optimizer_state.pt")
    shapes = {name: torch.Size(saved.shape(f"model/{name}")) for name in names}
    model = _model_state(shapes, progress)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(model, folder / name)


def _model_state(shapes: Mapping[str, torch.Size], progress: Progress) -> dict[str, Any]:
    step = progress.step
    return {
        "module": {},  # DeepSpeed takes the weights from `zero`
        "buffer_names": [],
        "param_shapes": [dict(shapes)],
        "shared_params": {},
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        # DeepSpeed's schedulers, then torch's.
        "lr_scheduler": {
            "last_batch_iteration": step - 1,
            "last_epoch": step,
            "_step_count": step + 1,
            "lr_lambdas": [],
        },
        "optimizer": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": step - progress.engine.optimizer_steps,
        "global_steps": step,
        "global_samples": progress.samples,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": LOWEST_VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }
