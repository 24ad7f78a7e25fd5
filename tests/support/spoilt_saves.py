"""Functions that damage a DeepSpeed save or make it unsupported. Each takes the folder of a step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Planted:
    """An object of an unknown class."""


def remove(save: Path) -> None:
    (save / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()


def cut(save: Path) -> None:
    file = save / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:5000])


def plant(save: Path) -> None:
    file = save / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file), "mine": Planted()}, file)


def forget_a_rank(save: Path) -> None:
    (save / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def mix(save: Path) -> None:
    other = save.parent.parent / "zero1" / save.name / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copyfile(other, save / other.name)


def shorten(save: Path) -> None:
    file = save / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    content["param_shapes"][1]["model.norm.weight"] = torch.Size((33,))
    torch.save(content, file)


def divide(save: Path) -> None:
    shutil.copyfile(save / "mp_rank_00_model_states.pt", save / "mp_rank_01_model_states.pt")


def point_nowhere(save: Path) -> None:
    (save.parent / "latest").write_text("global_step9")


def add_decay_to_the_gradient(save: Path) -> None:
    file = save / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    content["ds_config"] = {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}
    torch.save(content, file)


def deal_in_turn(save: Path) -> None:
    file = save / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    content["ds_config"] = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    torch.save(content, file)


def wrap_by_peft(save: Path) -> None:
    """Rename one parameter to the name of an adapter."""
    old, new = "model.layers.0.self_attn.q_proj.weight", "base_model.model.layers.0.self_attn.q_proj.lora_A.x.weight"
    for file in save.glob("*_states.pt"):
        content = torch.load(file, weights_only=False)
        named = content.get("param_shapes") or content["optimizer_state_dict"]["param_slice_mappings"]
        for each in named:
            if old in each:
                each[new] = each.pop(old)
        torch.save(content, file)


def leave_bias_in(save: Path) -> None:
    _change_optimizer(
        save, lambda states: states["base_optimizer_state"]["param_groups"][0].update(bias_correction=False)
    )


def make_elastic(save: Path) -> None:
    _change_optimizer(save, lambda states: states.update(base_optimizer_state=[]))


def _change_optimizer(save: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = save / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    change(content["optimizer_state_dict"])
    torch.save(content, file)


def keep_on_nvme(save: Path) -> None:
    (save / "offloaded_tensors").mkdir()


def divide_layers(save: Path) -> None:
    (save / "layer_01-model_states.pt").touch()


SPOILT: list[tuple[Callable[[Path], None], int, str]] = [
    (
        remove,
        1,
        "zero_pp_rank_0_mp_rank_00_optim_states.pt: expected a file of rank 0, found none; copy the whole",
    ),
    (cut, 1, "zero_pp_rank_1_mp_rank_00_optim_states.pt: expected a whole file of torch.save, found"),
    (plant, 2, "mp_rank_00_model_states.pt: a pickle that names tests.support.spoilt_saves.Planted, which is"),
    (forget_a_rank, 1, "global_step3: was saved by 2 ranks, has files of 1; copy those of all ranks into it"),
    (mix, 2, "global_step3: has files of different stages of ZeRO, of two saves; delete those of the older one"),
    (shorten, 1, "global_step3: has 32 elements of model.norm.weight, whose shape [33] has 33; copy all files of"),
    (
        divide,
        2,
        "mp_rank_01_model_states.pt is of a model divided by tensor or pipeline parallel; convert it first",
    ),
    (add_decay_to_the_gradient, 2, "global_step3: adam_w_mode=false adds weight decay to the gradient (Adam)"),
    (
        deal_in_turn,
        2,
        "global_step3: zero_optimization.round_robin_gradients=true, with which DeepSpeed records other",
    ),
    (
        wrap_by_peft,
        2,
        "of a model of peft; moments are taken of the matrices of LoRA alone, with one adapter",
    ),
    (leave_bias_in, 2, "global_step3: bias_correction=false, which adamw here always has; begin from its weights"),
    (make_elastic, 2, "optim_states.pt: zero_optimization.elastic_checkpoint=true: its states are not read"),
    (keep_on_nvme, 2, "global_step3: has optimizer states of NVMe in files of their own (offloaded_tensors)"),
    (divide_layers, 2, "global_step3: has the layers of a pipeline, or experts of DeepSpeed-MoE; convert it"),
    (point_nowhere, 1, "global_step9: expected the save that latest names, found none; copy the whole folder"),
]
"""Damage to a save, exit code of its import, text of the one-line message."""
