"""Tensor-parallel plans derived from a small copy of the model shard the right layers, and the check finds mistakes."""

from __future__ import annotations

import pytest

from configs.schema import Model
from tests.support import tensor_cases
from tests.support.harness import run_ranks
from tests.zoo.tiny import tiny
from trainer.axes.tensor.derive import derive
from trainer.model.build import build_model

ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise")
EXPECTED: dict[str, dict[str, str]] = {
    # The code of this model counts its heads in an attribute.
    "opt": {
        "model.decoder.layers.*.self_attn": "divide:num_heads",
        **{f"model.decoder.layers.*.self_attn.{name}": style for name, style in ATTENTION.items()},
        "model.decoder.layers.*.self_attn.out_proj": "rowwise",
        "model.decoder.layers.*.fc1": "colwise",
        "model.decoder.layers.*.fc2": "rowwise",
    },
    # The attention stays whole, because its bias counts all heads. Its matrices are sharded.
    "bloom": {
        "transformer.h.*.self_attention.query_key_value": "colwise_gather_output",
        "transformer.h.*.self_attention.dense": "colwise_gather_output",
        "transformer.h.*.mlp.dense_h_to_4h": "colwise",
        "transformer.h.*.mlp.dense_4h_to_h": "rowwise",
    },
    # The recurrence runs over channels, which a matrix in the middle mixes.
    "mamba": {
        "backbone.layers.*.mixer.in_proj": "colwise_gather_output",
        "backbone.layers.*.mixer.out_proj": "rowwise_split_input",
    },
    # The numbers in these names are positions in an `nn.Sequential`, not layers.
    "ctrl": {"transformer.h.*.ffn.0": "colwise", "transformer.h.*.ffn.2": "rowwise"},
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_what_is_cut(model_type: str) -> None:
    found = derive(build_model(Model(path=model_type), tiny(model_type)), 2)
    assert EXPECTED[model_type].items() <= found.items(), found
    if model_type == "opt":
        assert found == EXPECTED[model_type]


def test_derived_plans_pass_the_check() -> None:
    """The models have per-head norms between the matrices, a short convolution, or a tied bias of the LM head."""
    types = ["lfm2", "persimmon", "bert", "falcon"]
    assert run_ranks(2, tensor_cases.checked_types, types) == [dict.fromkeys(types, "")] * 2


def test_statistics_over_cut_features_are_found() -> None:
    message = run_ranks(2, tensor_cases.checked_without_ours, "gemma3n_text")[0]
    assert message.startswith("parallel.tensor_plan: wrong for gemma3n_text: the loss is ")
