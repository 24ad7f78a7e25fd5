"""Fused projections and experts of torchtitan's checkpoints are split and joined bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.load import load_config
from configs.schema import Model
from tests.support.foreign_trainers import (
    QKV,
    titan_key,
    to_titan,
)
from tests.test_checkpoint_import import imported
from trainer.checkpoint.__main__ import main
from trainer.model.build import build_hf_config, build_model

TITANS = {
    "llama": ["model=tiny"],
    "qwen3_moe": [
        *("model=tiny", "model.config.model_type=qwen3_moe", "model.config.num_experts=4"),
        *("model.config.moe_intermediate_size=24", "model.config.num_experts_per_tok=2"),
    ],
}
SMALL = ["model.config.hidden_size=32", "model.config.vocab_size=61", "model.config.num_hidden_layers=2"]


def _fused_by_torchtitan(whole: dict[str, torch.Tensor], queries: int, *, turned: bool) -> dict[str, torch.Tensor]:
    """Fuses queries, keys and values in one projection, ordered by key-value head. Experts become three stacks."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in whole.items():
        place, _, last = name.rpartition(".self_attn.")
        if last == "q_proj.weight":
            parts = ((each, whole[f"{place}.self_attn.{each}.weight"]) for each in QKV)
            q, k, v = (to_titan(each, part) if turned else part for each, part in parts)
            heads = [each.unflatten(0, (2, count, -1)) for each, count in ((q, queries), (k, 1), (v, 1))]
            made[f"{titan_key(place)}.attention.qkv_linear.wqkv.weight"] = torch.cat(heads, dim=1).flatten(0, 2)
        elif name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            inner = titan_key(name).replace("mlp.experts.gate_up_proj", "moe.routed_experts.inner_experts")
            made |= {f"{inner}.w1_EFD": gate.contiguous(), f"{inner}.w3_EFD": up.contiguous()}
        elif name.endswith("experts.down_proj"):
            made[titan_key(name).replace("mlp.experts.down_proj", "moe.routed_experts.inner_experts.w2_EDF")] = tensor
        elif last not in ("k_proj.weight", "v_proj.weight"):
            made[titan_key(name).replace("mlp.gate.", "moe.router.gate.")] = tensor
    return made


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", TITANS)
def test_fused_projections_and_experts_of_torchtitan_are_divided_and_joined(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.checkpoint import save  # pyright: ignore[reportPrivateImportUsage]

    config = build_hf_config(load_config([*TITANS[kind], *SMALL]).model)
    config.save_pretrained(tmp_path / "model")
    shapes = {name: parameter.shape for name, parameter in build_model(Model(), config).named_parameters()}
    expected = {
        part: {name: torch.randn(shape) for name, shape in shapes.items()}
        for part in ("model", "exp_avg", "exp_avg_sq")
    }
    queries = config.num_attention_heads // config.num_key_value_heads
    theirs = {part: _fused_by_torchtitan(whole, queries, turned=kind == "llama") for part, whole in expected.items()}
    states = {f"state.{name}.{part}": each for part in ("exp_avg", "exp_avg_sq") for name, each in theirs[part].items()}
    states |= {f"state.{name}.step": torch.tensor(3.0) for name in theirs["model"]}
    content = {**theirs["model"], "optimizer": states, "train_state": {"step": torch.tensor(3)}}
    save(content, checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    found = imported(tmp_path / "step-3", tmp_path / "ours", "--model", str(tmp_path / "model"))
    wanted = {f"{part}/{name}": tensor for part, whole in expected.items() for name, tensor in whole.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())
    broken = tmp_path / "step-3"
    if kind == "llama":
        config.num_key_value_heads = 4
        config.save_pretrained(tmp_path / "model")
        said = "attention.qkv_linear.wqkv.weight of the shape"
    else:
        broken = tmp_path / "biased/step-3"
        save(content | {"layers.1.moe.expert_bias": torch.ones(4)}, checkpoint_id=str(broken), no_dist=True)
        said = "holds layers.1.moe.expert_bias, by which torchtitan's routers choose experts"
    assert main(["import", str(broken), str(tmp_path / "no"), "--model", str(tmp_path / "model")]) == 2
    assert said in capsys.readouterr().err
