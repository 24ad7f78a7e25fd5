"""A model's stages, run one after another in one process, compute the whole model, for all kinds of architectures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.errors import ConfigError, PlanError
from configs.schema import Model
from tests.zoo.tiny import tiny
from trainer.axes.pipeline.check import check_stages
from trainer.axes.pipeline.probe import count_costs, examine
from trainer.axes.pipeline.split import Stage, split_model
from trainer.model.build import build_model, decoder_layers, held_layers, tied_names
from trainer.model.filling import materialize, units
from trainer.model.weights import RandomWeights

LAYERS = 5
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 67,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The comments name the peculiarity of each one that would break a split written for Llama alone.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},  # scales embeddings, caps logits, selects the attention by layer index; tied
    "gemma3_text": {},  # two rotary tables
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "cohere2": {},  # layer types, scaled logits; tied
    "gpt2": {},  # learned positions; tied
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 48},  # projections around the layers, an inner decoder; tied
    "bloom": {},  # normalised embeddings, alibi; layers return tuples; tied
    "ctrl": {"dff": 48},  # scales embeddings in place, a tied head with a bias
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "falcon": {},
    "mamba": {},  # no attention; tied
    "mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},
    "lfm2": {},  # convolutions and attention
    "recurrent_gemma": {},
}


def build(model_type: str) -> PreTrainedModel:
    base = AutoConfig.for_model(model_type)
    known = {*base.to_dict(), *base.attribute_map}
    fields = {name: value for name, value in FIELDS.items() if name in known}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(type(base)(**{**fields, **ARCHITECTURES[model_type]}))
    model.tie_weights()
    return model.eval()


def every_stage(model: PreTrainedModel, schedule: str, pp: int) -> list[Stage]:
    stages = [stage for rank in range(pp) for stage in split_model(model, schedule=schedule, pp=pp, rank=rank)]
    return sorted(stages, key=lambda stage: stage.index)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_stages_are_the_model(model_type: str) -> None:
    model = build(model_type)
    stages = every_stage(model, "zbv_zero_bubble", 2)
    weights = RandomWeights(model, seed=1)
    for module in (model, *(stage.module for stage in stages)):
        materialize(module, weights, device=torch.device("cpu"), dtype=torch.float64)
    tokens = torch.randint(3, 67, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = tokens
        for stage in stages:
            hidden = stage.module(hidden)
        assert torch.equal(hidden, model(input_ids=tokens, use_cache=False).logits)

    whole = dict(model.named_parameters())
    counted: list[str] = []
    for stage in stages:
        for name, parameter in stage.module.named_parameters():
            assert torch.equal(parameter, whole[name]), f"stage {stage.index}: {name}"
            counted += [name] if name not in stage.copies else []
    assert sorted(counted) == sorted(whole), "each parameter is counted once"
    assert bool(stages[0].tied) == bool(tied_names(model))


def test_stages_hold_their_layers_only() -> None:
    model = build("gpt2")
    stages = split_model(model, schedule="interleaved_1f1b", pp=2, rank=1, split=[1, 2, 1, 1])
    assert [stage.layers for stage in stages] == [range(1, 3), range(4, 5)]
    middle, last = (stage.module for stage in stages)
    assert [name for name, unit in units(middle) if list(unit.parameters())] == ["transformer.h.1", "transformer.h.2"]
    assert len(held_layers(middle)) == 2
    assert len(decoder_layers(middle)) == LAYERS
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    assert sum(p.numel() for p in middle.parameters()) == layers[1] + layers[2]
    assert tied_names(last) == {"lm_head.weight": "transformer.wte.weight"}
    assert not any("wpe" in name for name, _ in last.named_parameters())
    assert all(p.is_meta for p in model.parameters()), "the whole model was touched"
    assert len(held_layers(model)) == LAYERS


def test_splitting_leaves_the_model_as_it_was() -> None:
    model = build("gemma2")
    before = {name: type(module) for name, module in model.named_modules()}
    split_model(model, schedule="1f1b", pp=2, rank=0)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_positions_reach_every_stage() -> None:
    model = build("llama")
    stages = every_stage(model, "1f1b", 2)
    weights = RandomWeights(model, seed=1)
    for module in (model, *(stage.module for stage in stages)):
        materialize(module, weights, device=torch.device("cpu"), dtype=torch.float64)
    tokens = torch.randint(3, 67, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(5), *range(7)]])  # two documents
    with torch.no_grad():
        hidden = tokens
        for stage in stages:
            hidden = stage.module(hidden, position_ids=positions)
        assert torch.equal(hidden, model(input_ids=tokens, position_ids=positions, use_cache=False).logits)
        assert not torch.equal(hidden, model(input_ids=tokens, use_cache=False).logits)


def test_gradients_flow_through_the_border() -> None:
    model = build("gpt2")
    for module in (first := every_stage(model, "1f1b", 2)):
        materialize(module.module, RandomWeights(model, seed=1), device=torch.device("cpu"), dtype=torch.float64)
    received = torch.randn(2, 12, 32, dtype=torch.float64, requires_grad=True)
    first[1].module(received).sum().backward()
    assert received.grad is not None and received.grad.abs().sum() > 0
    assert first[1].border.received is None, "an activation outlives its micro-batch"


def test_costs_count_active_experts_and_the_head() -> None:
    layers, head = count_costs(model := build("llama"), examine(model))
    assert layers == [1.0] * LAYERS
    attention, mlp = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48
    assert head == pytest.approx(67 * 32 / (attention + mlp))
    sparse = build("mixtral")
    gate, experts = 32 * 4, 2 * 3 * 32 * 48
    assert count_costs(sparse, examine(sparse))[1] == pytest.approx(67 * 32 / (attention + gate + experts))


def test_too_many_stages_and_odd_splits_are_refused() -> None:
    model = build("llama")
    with pytest.raises(PlanError, match="has 5 layers, 6 stages"):
        split_model(model, schedule="1f1b", pp=6, rank=0)
    with pytest.raises(PlanError, match="adds up to 4"):
        split_model(model, schedule="1f1b", pp=2, rank=0, split=[2, 2])


@pytest.mark.parametrize(
    ("defect", "reason"),
    [
        ("second stream", "layer 1 gets more than the hidden states"),
        ("skip", "layer 1 is called where layer 0 was expected"),
        ("changed between", "layer 1 does not get what the layer before returned"),
        ("called between", "transformer.ln_f is called between layers"),
        ("own parameter", "transformer owns parameters outside its layers"),
    ],
)
def test_models_that_are_no_chain_are_refused(defect: str, reason: str) -> None:
    model = build("gpt2")
    body: Any = model.transformer
    blocks = copy.copy(body.h)

    def forward(input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = body.wte(input_ids) + body.wpe(torch.arange(input_ids.shape[1]))
        kept = None
        for number, block in enumerate(blocks):
            if defect == "skip" and number == 0:
                continue
            if defect == "called between" and number == 2:
                body.ln_f(hidden)
            hidden = block(hidden, kept if defect == "second stream" else None)
            kept = hidden * 2 if number == 0 else kept
            hidden = hidden * 2 if defect == "changed between" else hidden
        return model.lm_head(body.ln_f(hidden))

    model.forward = forward
    if defect == "own parameter":
        body.scale = nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(ConfigError, match=reason):
        examine(model)


@pytest.mark.parametrize("model_type", ["gemma4_text", "camembert", "deepseek_v4"])
def test_stages_train_the_whole_model(model_type: str) -> None:
    """gemma4_text has embeddings per layer, which every stage computes again; camembert registers its head of several
    modules before the body; deepseek_v4 passes several streams of hidden states between stages."""
    model = build_model(Model(path=model_type), tiny(model_type))
    stages = every_stage(model, "1f1b", 2)
    assert stages[0].repeated == (model_type == "gemma4_text")
    assert (stages[1].hidden == (64,)) == (model_type != "deepseek_v4")
    assert isinstance(model.get_output_embeddings(), nn.Linear) and stages[0].module.get_output_embeddings() is not None
    check_stages(model.config, stages[0].lengths)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma3n_text", "a stage does not run: "), ("prophetnet", "a stage does not run: ")],
)
def test_what_layers_keep_for_later_ones_is_found(model_type: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^parallel\.pp: a {model_type} cannot be cut into .*: {reason}"):
        check_stages(tiny(model_type), (2, 2))


def test_repeated_parts_want_one_stage_per_rank() -> None:
    with pytest.raises(PlanError, match=r"^parallel\.pipeline\.schedule=.* use gpipe or 1f1b$"):
        every_stage(build_model(Model(path=""), tiny("gemma4_text")), "interleaved_1f1b", 2)
