"""Step timer, peak memory, MFU, and FLOPs per token compared with counted FLOPs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from configs.load import load_config
from tests.support.harness import run_ranks
from tests.support.reports import lone_plan, tiny_model
from trainer.flops import Flops, count_parameters, counted_flops, mfu, model_flops, peak_flops
from trainer.linear import float8
from trainer.model.build import build_hf_config
from trainer.passes import prepare_model
from trainer.plan.model_fields import attention_spans, keys_seen
from trainer.report import measure
from trainer.report.measure import StepSeconds, StepTimer, _host_peak, peak_memory

CPU = torch.device("cpu")


class Clock:
    """A clock that moves only when a test changes `now`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_the_timer_splits_a_step_and_begins_again(clock: Clock) -> None:
    timer = StepTimer(CPU)
    for scale in (1.0, 4.0):
        with timer.data():
            clock.now += scale
        with timer.forward_backward():
            clock.now += 8 * scale
        clock.now += 0.5  # the loop's own work
        with timer.optimizer():
            clock.now += 2 * scale
        assert timer.finish() == StepSeconds(
            step=11 * scale + 0.5, data=scale, forward_backward=8 * scale, optimizer=2 * scale
        )
        clock.now += 100.0  # time between steps, as in a validation, is not counted


def touch_and_release() -> list[int]:
    """Return the peak memory of a fresh process before, during and after it holds a block of 128 MiB."""
    torch.ones(2**16)  # loads torch's code for filling a block
    peaks = [peak_memory(CPU).host_bytes or 0]
    block = torch.ones(2**25)
    peaks.append(peak_memory(CPU).host_bytes or 0)
    del block
    return [*peaks, peak_memory(CPU).host_bytes or 0]


def test_peak_memory_of_the_host_is_a_high_water_mark() -> None:
    assert peak_memory(CPU).allocated_bytes is None
    assert peak_memory(CPU).reserved_bytes is None
    ((before, holding, after),) = run_ranks(1, touch_and_release)
    assert before > 2**25
    # The kernel counts pages in batches per CPU, so its numbers may be off by a few pages.
    assert holding - before == pytest.approx(2**27, abs=2**23)
    assert after == pytest.approx(holding, abs=2**22)


def test_peak_memory_is_null_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert _host_peak(tmp_path / "missing") is None
    (tmp_path / "status").write_text("VmPeak:\t 99 kB\nVmHWM:\t 7 kB\n")
    assert _host_peak(tmp_path / "status") == 7 * 1024


SMALL = ["model.config.num_hidden_layers=2", "model.config.hidden_size=256", "model.config.num_attention_heads=4"]
SMALL += ["model.config.num_key_value_heads=4", "model.config.vocab_size=260", "model.config.pad_token_id=0"]
LATENT = ["model.config.first_k_dense_replace=1", "model.config.topk_group=1", "model.config.num_experts_per_tok=2"]
LATENT += ["model.config.moe_intermediate_size=256", "model.config.intermediate_size=512"]
LATENT += ["model.config.q_lora_rank=64", "model.config.kv_lora_rank=64"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny"],
        ["model=tiny_gpt2", "model.config.n_positions=64"],
        ["model=tiny_qwen3"],
        # Routed experts count in proportion to a token's top k; a shared expert and a dense first layer count once.
        ["model=qwen3_30b_a3b", *SMALL, "model.config.num_experts=8", "model.config.num_experts_per_tok=2"],
        ["model=gpt_oss_20b", *SMALL, "model.config.num_local_experts=8", "model.config.intermediate_size=256"],
        ["model=deepseek_v3", *SMALL, *LATENT, "model.config.n_routed_experts=8", "model.config.n_group=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_flops_per_token_agree_with_a_count_of_matmuls(overrides: list[str]) -> None:
    config = load_config([*overrides, "model.attention=eager"])
    model = tiny_model(config).to_empty(device=CPU)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    tokens = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    formula = counted_flops(model.config, parameters=count_parameters(model, active=True), seq_len=64).both
    # N includes norms, biases and learned positions, which no matmul uses; the first layer's input needs no gradient.
    assert formula == pytest.approx(counted, rel=0.06)


def test_flops_per_token_of_a_published_model() -> None:
    llama = build_hf_config(load_config(["model=llama3_1_8b"]).model)
    # The model has 8.03e9 parameters (128,256 x 4,096 in the input embedding) and 32 layers with 32 heads of 128.
    assert counted_flops(llama, parameters=8_030_261_248, seq_len=8192).both == pytest.approx(
        6 * (8_030_261_248 - 128_256 * 4096) + 12 * 32 * 4096 * 8192
    )


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (["model=tiny"], 16),
        (["model=tiny", "model.config.model_type=mistral", "model.config.sliding_window=5"], 5),
        (["model=gemma2_2b", *SMALL, "model.config.sliding_window=6"], 6),
        (["model=gpt_oss_20b", *SMALL, "model.config.num_local_experts=4", "model.config.sliding_window=7"], 7),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_window_is_as_long_as_what_the_last_token_attends_to(overrides: list[str], seen: int) -> None:
    fields = build_hf_config(load_config(overrides).model)
    model = AutoModelForCausalLM.from_config(fields, attn_implementation="eager")
    found = model(input_ids=torch.arange(3, 19)[None], use_cache=False, output_attentions=True).attentions
    attended = [int((layer[0, 0, -1, :16] > 0).sum()) for layer in found]
    assert min(attended) == seen
    spans = attention_spans(model.config.get_text_config().to_dict())
    assert [min(span or 16, 16) for span in spans] == attended
    assert keys_seen(spans, 16) == sum(attended)


def test_a_layer_with_a_window_counts_the_window() -> None:
    gpt_oss = build_hf_config(load_config(["model=gpt_oss_20b"]).model)
    # 12 of 24 layers have a window of 128 tokens; each layer has 64 heads of 64.
    numbers = {length: counted_flops(gpt_oss, parameters=10**9, seq_len=length).forward for length in (64, 32_768)}
    assert numbers[32_768] - numbers[64] == 4 * 64 * 64 * (12 * (32_768 - 64) + 12 * (128 - 64))


def test_parameters_are_counted_whole_where_a_rank_holds_a_part() -> None:
    model = tiny_model(load_config([])).to_empty(device=CPU)
    whole = count_parameters(model)
    parameter = next(model.parameters())
    size = parameter.numel()
    parameter.data = torch.empty(0)
    assert count_parameters(model) == whole - size
    vars(parameter)["ds_numel"] = size  # the attribute that DeepSpeed sets on a partitioned parameter
    assert count_parameters(model) == whole


def test_mfu_is_the_share_of_all_devices_peak() -> None:
    assert mfu(10_000, flops_per_token=5e10, world_size=2, peak_flops=1e15) == pytest.approx(0.25)


def test_a_step_counts_what_runs_in_float8_and_what_its_update_runs() -> None:
    config = load_config(["model=tiny", "precision=fp8"])
    model = prepare_model(config)
    found, text = model_flops(model, seq_len=64), model.config.get_text_config()
    width, inner = text.hidden_size, text.intermediate_size
    attention = 2 * width * (width + text.num_key_value_heads * (width // text.num_attention_heads))
    assert found.float8 == 2 * text.num_hidden_layers * (attention + 3 * width * inner)
    assert found.step(config) == found.both == 3 * found.forward
    assert found.step(load_config(["optimizer=mezo"])) == 2 * found.forward
    # MeZO's two forwards cost the same if the base model is frozen.
    assert Flops(forward=4.0, spared=4.0).step(load_config(["optimizer=mezo", "tuning=lora"])) == 8


def test_the_peak_is_that_of_the_card_and_the_dtype() -> None:
    def peak(gpu: str | None, *overrides: str) -> float | None:
        config = load_config(list(overrides))
        return peak_flops(config, lone_plan(*overrides), gpu, Flops(forward=4.0, float8=3.0 * float8.chosen(config)))

    assert peak("NVIDIA H200", "precision=bf16") == 989.4e12
    assert peak("NVIDIA H200", "precision=fp32") == 67e12
    # Three quarters of the FLOPs are in float8; with the other recipe, half of the backward is not.
    both = ("precision=fp8", "precision.float8.recipe=rowwise_with_gw_hp")
    assert peak("NVIDIA H200", "precision=fp8") == pytest.approx(1 / (0.75 / 1978.9e12 + 0.25 / 989.4e12))
    assert peak("NVIDIA H200", *both) == pytest.approx(1 / (0.5 / 1978.9e12 + 0.5 / 989.4e12))
    assert peak("NVIDIA H200", "precision=tf32") == 494.7e12
    assert peak("NVIDIA Unheard", "precision=bf16") is None
    assert peak("NVIDIA Unheard", "precision=bf16", "cluster.gpu=L4") == 121e12
    assert peak(None, "precision=bf16", "cluster.gpu=L4") is None, "a CPU run has no MFU"
