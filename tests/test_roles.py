"""Each parameter's role in its model, and the matrices that it holds."""

from __future__ import annotations

import re

import pytest

from configs.load import load_config
from trainer.model.causal import build_causal
from trainer.model.roles import Described, Matrices, Role, describe
from trainer.passes import prepare_model

PLAIN = Matrices()
STACK = {"stacked": True, "dim": 1}


def described(*words: str) -> dict[str, Described]:
    """Return the parameters that are not vectors, by name without the layer index."""
    found = describe(build_causal(load_config(["model=tiny", *words]))).values()
    return {re.sub(r"^.*\.\d+\.|^model\.", "", one.name): one for one in found if one.role is not Role.vector}


def test_gpt2_packs_query_key_and_value_in_a_transposed_weight() -> None:
    found = described("model=tiny_gpt2")
    assert found["attn.c_attn.weight"].role is Role.packed
    assert found["attn.c_attn.weight"].matrices == Matrices(parts=(128, 128, 128), dim=1, transposed=True)
    assert found["mlp.c_fc.weight"].matrices == Matrices(dim=1, transposed=True)
    tied = found["lm_head.weight"].role, found["transformer.wte.weight"].role, found["transformer.wpe.weight"].role
    assert tied == (Role.embedding,) * 3


def test_parts_of_a_packed_weight_may_differ() -> None:
    found = described("model.config.model_type=phi3", "model.config.pad_token_id=0")
    assert found["self_attn.qkv_proj.weight"].matrices == Matrices(parts=(128, 64, 64))
    assert found["mlp.gate_up_proj.weight"].matrices == Matrices(parts=(352, 352))
    assert (found["mlp.down_proj.weight"].matrices, found["lm_head.weight"].role) == (PLAIN, Role.head)


def test_a_users_plan_can_say_that_a_weight_is_packed() -> None:
    """Tensor parallelism shards each part separately, and Muon updates each separately."""
    model = build_causal(load_config(["model=tiny"]))
    plan = {"model.layers.*.mlp.up_proj": "packed_colwise:2", "model.layers.*.mlp.gate_proj": "replicate"}
    found = describe(model, plan)
    up, gate = (found[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "gate"))
    assert (up.role, up.matrices) == (Role.packed, Matrices(parts=(176, 176)))
    assert (gate.role, gate.matrices) == (Role.matrix, PLAIN)


@pytest.mark.parametrize(
    ("kind", "gate_up", "router"),
    [
        ("mixtral", Matrices(parts=(352, 352), **STACK), "mlp.gate.weight"),
        ("gpt_oss", Matrices(stacked=True, dim=2, transposed=True), "mlp.router.weight"),
        ("llama4_text", Matrices(parts=(352, 352), stacked=True, dim=2, transposed=True), "feed_forward.router.weight"),
    ],
)
def test_experts_are_stacks_of_matrices_and_have_a_router(kind: str, gate_up: Matrices, router: str) -> None:
    """gpt_oss interleaves gate and up features, so neither is a contiguous block."""
    found = described(f"model.config.model_type={kind}", "model.config.num_local_experts=4")
    (experts,) = (one for name, one in found.items() if name.endswith("experts.gate_up_proj"))
    assert (experts.role, experts.matrices) == (Role.experts, gate_up)
    assert found[router].role is Role.router and found["embed_tokens.weight"].role is Role.embedding
    assert {name for name, one in found.items() if one.role is Role.router} == {router}


def test_adapters_of_experts_count_as_experts_and_their_router_stays_one() -> None:
    """An adapter pair has rows for each expert, and a token uses those of its selected experts. With rank 1, A has one
    row per expert, like a router."""
    words = ["model=tiny", "model.config.model_type=mixtral", "model.config.num_local_experts=4", "tuning=lora"]
    words += ["tuning.rank=1", "tuning.target_modules=[experts.gate_up_proj,q_proj]"]
    found = describe(prepare_model(load_config(words)))
    routed = {re.sub(r"^.*\.\d+\.", "", name) for name, one in found.items() if one.routed == (2, 4)}
    assert routed == {
        *(f"mlp.experts.lora_{side}.default.weight" for side in "AB"),
        *(f"mlp.experts.base_layer.{leaf}_proj" for leaf in ("gate_up", "down")),
    }
    assert {re.sub(r"^.*\.\d+\.", "", name) for name, one in found.items() if one.role is Role.router} == {
        "mlp.gate.weight"
    }
