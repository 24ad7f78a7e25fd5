"""Context parallelism starts with a check that only attention mixes positions of the sequence."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.errors import ConfigError
from tests.zoo.tiny import tiny
from trainer.axes.sequence import rotate_as_whole
from trainer.axes.sequence_check import check_sequence

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gemma2", "mixtral", "deepseek_v3", "olmo2", "opt"])
def test_attention_alone_is_accepted(model_type: str) -> None:
    check_sequence(tiny(model_type), cp=2)


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "jamba", "rwkv", "recurrent_gemma", "bloom"])
def test_what_runs_along_the_sequence_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_sequence(tiny(model_type), cp=4)
    (line,) = refused.value.problems
    assert line.startswith(f"parallel.cp=4: a {model_type} carries something along the sequence outside of attention")


@pytest.mark.parametrize("model_type", ["bart", "data2vec-text"])
def test_positions_that_a_model_counts_itself_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=f"a {model_type} counts positions from the first token that it is given"):
        check_sequence(tiny(model_type), cp=2)


@pytest.mark.parametrize("model_type", ["phi3", "phimoe"])
def test_slices_are_rotated_with_the_frequencies_of_the_whole_sequence(model_type: str) -> None:
    config = tiny(model_type)
    pairs = config.hidden_size // config.num_attention_heads // 2
    config.rope_parameters = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8},
        **{"short_factor": [1.0] * pairs, "long_factor": [4.0] * pairs, "short_mscale": 1.0, "long_mscale": 1.5},
    }
    config.original_max_position_embeddings = 8
    x, positions = torch.zeros(1, 16, config.hidden_size), torch.arange(16)[None]
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    expected, short = rotary(x, positions), rotary(x[:, :8], positions[:, :8])
    assert not torch.allclose(short[0], expected[0][:, :8])
    for rank in range(2):
        model = AutoModelForCausalLM.from_config(config).model
        rotate_as_whole(model, rank=rank, size=2)
        own = slice(8 * rank, 8 * rank + 8)
        found = model.rotary_emb(x[:, own], position_ids=positions[:, own])
        torch.testing.assert_close(found, tuple(part[:, own] for part in expected))


def test_what_cannot_be_tried_is_refused() -> None:
    config = tiny("llama")
    config.hidden_act = "no such function"
    with pytest.raises(ConfigError, match="nothing shows that a llama can be split along its sequences"):
        check_sequence(config, cp=2)


def test_no_rank_builds_a_large_model_for_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.model.miniature.LARGEST", 1000)
    with pytest.raises(ConfigError, match="small copy does not run: its layers are too large to try"):
        check_sequence(tiny("llama"), cp=2)


def test_tiny_models_of_the_zoo_are_tiny_and_compute() -> None:
    for model_type in ("llama", "gpt2", "gpt_oss", "mamba"):
        model = AutoModelForCausalLM.from_config(tiny(model_type))
        assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
        assert torch.isfinite(model(input_ids=torch.arange(3, 11)[None]).logits).all()
