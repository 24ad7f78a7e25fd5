"""Exports a checkpoint as torch distributed ones of an FSDP model, for scripts and accelerate under any number of
ranks.

python -m trainer.checkpoint export RUN_DIR OUT --format dcp

    OUT/pytorch_model_fsdp_0   {"model": {NAME: weight}}
    OUT/optimizer_0            {"optimizer": {"state": {NAME: {step, exp_avg, exp_avg_sq}}, "param_groups": [...]}}

Keys are those of `torch.distributed.checkpoint.state_dict`: parameters by name, and two groups, with weight decay and
without.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import save  # pyright: ignore[reportPrivateImportUsage]

from trainer.checkpoint.outgoing import STATES, Outgoing, outgoing

MODEL_FOLDER, OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"


def export_distributed(source: Path, target: Path) -> Path:
    """Write the checkpoint, or the newest intact one of a run, to `target`. Returns the checkpoint. Raises as
    `outgoing` does."""
    with outgoing(source, target, what="a checkpoint of FSDP") as it, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the missing process group
        # Mapped from the files: only the tensor that is being written takes memory.
        weights = {name: it.saved.read(f"model/{name}") for name in it.names}
        save({"model": weights}, checkpoint_id=it.partial / MODEL_FOLDER, no_dist=True)
        step = torch.tensor(float(it.progress.engine.optimizer_steps))
        states = {name: {"step": step} | {k: it.saved.read(f"{k}/{name}") for k in STATES} for name in it.names}
        optimizer = {"state": states, "param_groups": _groups(it, weights)}
        save({"optimizer": optimizer}, checkpoint_id=it.partial / OPTIMIZER_FOLDER, no_dist=True)
    return it.folder


def _groups(it: Outgoing, weights: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """In the form of torch's AdamW. Settings are the run's, else those of the trainer that the checkpoint came from."""
    config, said = it.config(), it.progress.origin.get("settings", {})
    if config is not None:
        said = {f"optimizer.{key}": value for key, value in vars(config.optimizer).items()}
    found = {key.removeprefix("optimizer."): value for key, value in said.items() if key.startswith("optimizer.")}
    peak = found.get("lr", 1e-3)
    next_lr = it.next_lr()
    groups = []
    for decays in (True, False):
        optimizer = torch.optim.AdamW(
            [torch.zeros(1)],
            lr=peak if next_lr is None else next_lr,
            betas=(found.get("beta1", 0.9), found.get("beta2", 0.999)),
            eps=found.get("eps", 1e-8),
            weight_decay=found.get("weight_decay", 1e-2) if decays else 0.0,
        )
        names = [name for name, weight in weights.items() if (weight.ndim >= 2) is decays]
        groups.append({**optimizer.state_dict()["param_groups"][0], "initial_lr": peak, "params": names})
    return groups
