"""`train.chunked_loss=true`: the head computes the loss slice by slice, and nothing else changes."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.harness import run_ranks
from tests.support.parity import distance, reference, words
from tests.support.sliced_cases import train_in_slices
from trainer.axes.tensor.vocabulary import chunked_cross_entropy_sum
from trainer.model import head
from trainer.model.loss import cross_entropy_sum
from trainer.model.objective import Objective

LAYOUTS = [
    (["ddp"], 2, "gpt2"),
    (["fsdp"], 2, "llama"),
    (["tensor_fsdp"], 4, "gpt2"),
    (["pipeline", "parallel.pipeline.schedule=zbv_zero_bubble"], 2, "gpt2"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67}
HEADS = {
    "llama": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},  # soft-caps, tied
    "granite": {"logits_scaling": 2.0},
    "cohere": {},  # scaled, tied
    "ctrl": {"dff": 48, "n_embd": 32, "n_layer": 2, "n_head": 4},  # a bias, tied
}


@pytest.mark.parametrize(("layout", "processes", "model"), LAYOUTS)
def test_slices_equal_one_piece(layout: list[str], processes: int, model: str) -> None:
    expected, (preset, *keys) = reference(model, "fp64", 2), layout
    overrides = words(model, preset, "fp64", 2, "train.chunked_loss=true", *keys)
    ranks = run_ranks(processes, train_in_slices, overrides)
    assert distance(ranks[0], expected).largest < 1e-10


@pytest.mark.parametrize("model_type", HEADS)
@pytest.mark.parametrize("matrix", [True, False])
def test_every_kind_of_head(model_type: str, matrix: bool) -> None:
    """matrix: whether the head may be treated as a plain matrix. If false, autograd goes through the head's forward."""
    base = AutoConfig.for_model(model_type)
    known = {*base.to_dict(), *base.attribute_map}
    fields = {name: value for name, value in SIZES.items() if name in known} | HEADS[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(base)(**{**fields, "pad_token_id": 0}), dtype=torch.float64)
    ids = torch.randint(3, 67, (2, 13))
    labels = torch.where(torch.rand(2, 13) < 0.3, -100, ids.roll(-1, 1))
    model.eval()
    expected = cross_entropy_sum(model(input_ids=ids, use_cache=False).logits, labels)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with patch.object(head, "SLICE_ELEMENTS", 5 * 67), patch.object(head, "is_plain_linear", lambda _: matrix):
        head.slice_head(model)
        Objective(loss=chunked_cross_entropy_sum, sliced=True).attach(model, staged=False)
        loss = model(input_ids=ids, use_cache=False, targets=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.get(name), rtol=1e-9, atol=1e-9)
