"""`moe`: balancing of routed experts equals one process under every layout, and `micro_batch` equals the aux loss of
transformers. Unsupported combinations are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import PlanError
from configs.load import load_config
from launch.estimate import main as memory_estimate
from tests.support.cases import train
from tests.support.harness import run_ranks
from tests.support.moe_cases import COEFFICIENT, EXPERTS, KINDS, apart, beside_transformers, expected, found
from tests.support.parity import distance
from tests.support.parity import words as words_of
from tests.support.resuming import resume_each, train_then_resume_each
from tests.support.selection import rows
from tests.test_parity import FLOAT64
from trainer.axes.pipeline.table import SCHEDULES
from trainer.make_plan import make_plan
from trainer.model.miniature import shrink
from trainer.moe.routers import find_routers, probabilities, read, to_logits
from trainer.moe.seen import micro_batch
from trainer.plan.machine import Machine

COMMON = ["model=tiny", "data=synthetic", "data.seq_len=32", "data.ignore_fraction=0.6", "train.micro_batch_size=2"]
COMMON += ["train.eval_samples=2", "train.clip_grad_norm=0.25", "train.steps=2", "optimizer.lr=3e-3"]
DEEPSEEK = ["model.config.model_type=deepseek_v3", "model.config.n_routed_experts=4", "model.config.n_group=1"]
DEEPSEEK += ["model.config.topk_group=1", "model.config.num_experts_per_tok=2", "model.config.first_k_dense_replace=0"]
DEEPSEEK += ["model.config.moe_intermediate_size=32", "model.config.num_key_value_heads=4"]
GLOBAL = ("moe=global_batch", f"moe.coefficient={COEFFICIENT}", "moe.z_loss=0.01")
SEQUENCE = ("moe=sequence", f"moe.coefficient={COEFFICIENT}")
MICRO = ("moe=micro_batch", f"moe.coefficient={COEFFICIENT}")
TWO, FOUR = "train.gradient_accumulation_steps=2", "train.gradient_accumulation_steps=4"
FULL, SELECTIVE = "train.activation_checkpointing=full", "train.activation_checkpointing=selective"
SCHEDULE = "parallel.pipeline.schedule"
SHOWN = "zbv_zero_bubble"
BY_SEQUENCE: dict[str, tuple[str, ...]] = {"interleaved_zero_bubble": SEQUENCE, "dualpipev": SEQUENCE}
# Each rank's routers see only part of the tokens.
PARTS = ("parallel.tp=2", "parallel.sequence_parallel=true")
# The cases cover replicas, shards with recompute, shared tokens, pipeline stages, parts of sequences, and experts on
# other ranks.
LAYOUTS = [
    (GLOBAL, "ddp", 2, (TWO,)),
    (GLOBAL, "fsdp", 2, (TWO, FULL)),
    (GLOBAL, "tensor", 2, (TWO, "parallel.sequence_parallel=true", SELECTIVE)),
    (GLOBAL, "pipeline", 2, (FOUR, f"{SCHEDULE}={SHOWN}")),
    (SEQUENCE, "context", 2, (TWO,)),
    (GLOBAL, "expert_fsdp", 4, (TWO, FULL)),
    (SEQUENCE, "expert", 4, (TWO, *PARTS)),
]
MORE = [
    (SEQUENCE, "3d", 8, (TWO, FULL)),
    (SEQUENCE, "expert", 4, (TWO, "parallel.tp=2")),
    (GLOBAL, "expert", 4, (TWO, *PARTS, FULL)),
    (SEQUENCE, "expert", 8, (TWO, *PARTS, "parallel.cp=2")),
    ((*GLOBAL, "tuning=prompt", "tuning.virtual_tokens=4"), "expert", 4, (TWO, *PARTS)),
    (GLOBAL, "expert_fsdp", 4, (TWO, "parallel.pp=2", f"{SCHEDULE}=interleaved_1f1b")),
    (SEQUENCE, "expert_fsdp", 4, (TWO, "parallel.cp=2")),
    (GLOBAL, "hsdp", 4, (TWO,)),
    (GLOBAL, "3d", 8, (TWO,)),
    (GLOBAL, "context", 4, (TWO, "parallel.tp=2")),
    (SEQUENCE, "fsdp", 4, (TWO,)),
    *(
        (BY_SEQUENCE.get(name, GLOBAL), "pipeline", 2, (FOUR, f"{SCHEDULE}={name}"))
        for name in SCHEDULES
        if name != SHOWN
    ),
]


@pytest.mark.parametrize(
    ("balance", "layout", "processes", "keys"), rows([*LAYOUTS, *MORE], lambda *row: row in LAYOUTS[2:])
)
def test_layout_equals_single_process(
    balance: tuple[str, ...], layout: str, processes: int, keys: tuple[str, ...]
) -> None:
    far = apart(layout, processes, keys, balance)
    assert far.largest <= FLOAT64, far


def test_micro_batches_of_other_ranks_are_as_good_as_own() -> None:
    """Layouts with the same micro-batches have the same term, whichever ranks the micro-batches are on."""
    two_ranks, alone = found("fsdp", 2, "none", *MICRO, TWO, FULL), expected(*MICRO, FOUR)
    assert distance(two_ranks, alone).largest <= FLOAT64
    parts = found("expert", 4, "none", *MICRO, TWO, *PARTS)
    assert distance(parts, alone).largest <= FLOAT64
    assert two_ranks.losses[0] != expected(*MICRO, TWO).losses[0], "the term does not depend on the cut"


def test_virtual_tokens_and_padding_are_no_load() -> None:
    inputs = torch.zeros(2, 4, dtype=torch.long)
    parts = [micro_batch(inputs, torch.tensor([4, 1]), before=2, part=(rank, 2)) for rank in range(2)]
    counted = [part.counted for part in parts if part.counted is not None]
    assert all(part.shape == (2, 3) for part in parts)
    assert torch.cat(counted, dim=1).int().tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]
    assert [part.lengths(inputs.device).tolist() for part in parts] == [[1, 1], [3, 0]]
    plain = micro_batch(inputs, None, before=0, part=(0, 1))
    assert plain.counted is None and plain.lengths(inputs.device).tolist() == [4, 4]


def test_virtual_tokens_go_through_routers_too() -> None:
    """The test has padding, whose mask does not cover the virtual tokens, and a balancing term."""
    found = expected(*GLOBAL, "tuning=prompt", "tuning.virtual_tokens=4", TWO)
    plain = expected("tuning=prompt", "tuning.virtual_tokens=4", TWO)
    assert found.losses[0] > plain.losses[0] + 0.1


def words(kind: str, *extra: str) -> list[str]:
    return [*COMMON, f"model.config.model_type={kind}", *KINDS[kind], *extra]


@pytest.mark.parametrize(("kind", "accumulation"), [("mixtral", 2), ("qwen3_moe", 1)])
def test_micro_batch_is_transformers_own(kind: str, accumulation: int) -> None:
    extra = [*MICRO, "parallel=single", f"train.gradient_accumulation_steps={accumulation}"]
    ours, plain = run_ranks(1, beside_transformers, words(kind, *extra))[0]
    assert ours == pytest.approx(plain, rel=1e-5)


def test_float64_trains_with_experts_one_by_one() -> None:
    """torch's grouped matmul for experts does not support float64."""
    losses = run_ranks(1, train, words("mixtral", "precision=fp64"))[0].losses
    assert losses[1] < losses[0] < 6


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("moe=micro_batch parallel=pipeline", "moe.balance=micro_batch: is a mean over all layers and tokens of a"),
        ("moe=micro_batch parallel=context", "moe.balance=micro_batch: is a mean .* and parallel.cp=2 gives each"),
        ("moe.coefficient=0.1", r"moe.coefficient=0.1: is read with moe.balance only; set that too \(moe=global_batch"),
        ("model.config.router_aux_loss_coef=0.1", "model.config.router_aux_loss_coef=0.1: is read with moe.balance"),
        ("model.config.output_router_logits=true", "model.config.output_router_logits=true: moe.balance chooses the"),
        ("moe=sequence train.compile=true", "train.compile=true: fuses the routers that moe.balance=sequence reaches"),
        (
            "moe=bias tuning=lora",
            "moe.bias_update_rate=0.001: changes the model's own routers, which tuning.method=lora",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(overrides: str, says: str) -> None:
    with pytest.raises(PlanError, match=f"(?m)^{says}"):
        make_plan(load_config(words("mixtral", *overrides.split())), Machine(gpus=2))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["moe=global_batch"], "moe.balance=global_batch: LlamaForCausalLM has no routed experts; leave it out"),
        (["moe=bias", *EXPERTS], "moe.bias_update_rate=0.001: the routers of Qwen3MoeForCausalLM have no bias"),
        (
            ["moe=sequence", *DEEPSEEK],
            "moe.coefficient=null: the config of DeepseekV3ForCausalLM says none; give one",
        ),
    ],
)
def test_a_model_without_what_is_asked_is_refused(
    overrides: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memory_estimate([*COMMON, *overrides]) == 2
    assert says in capsys.readouterr().err


def test_memory_is_estimated_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_estimate(words("mixtral", *GLOBAL, "parallel=ddp", "cluster=8xh100", "estimate.format=json")) == 0
    assert '"verdict": "fits"' in capsys.readouterr().out


SCORES = {  # family -> (whether each expert has its own sigmoid score, module of the self-correcting bias)
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "gpt_oss", "granitemoe"), (False, "")),
    **dict.fromkeys(("ernie4_5_moe", "minimax", "jamba", "flex_olmo"), (False, "")),
    **dict.fromkeys(("llama4_text", "afmoe"), (True, "")),
    **dict.fromkeys(("deepseek_v3", "glm4_moe"), (True, "mlp.gate")),
    "minimax_m2": (True, "mlp"),
    "longcat_flash": (False, "mlp.router"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SCORES)
def test_routers_are_found_and_read(family: str) -> None:
    """The balanced probabilities are the weights of the experts, up to one factor for each token."""
    config = shrink(AutoConfig.for_model(family), 1, whole_depth=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    routers, outputs = find_routers(model), []
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    routers[0].module.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(input_ids=torch.randint(3, model.config.get_text_config().vocab_size, (2, 8)), use_cache=False)
    routed = read(routers[0], outputs[0])
    assert routed.chosen.shape == (16, routers[0].module.top_k) and routed.logits.shape == (16, routers[0].experts)
    scores = outputs[0][routed.scores]
    scores = scores.gather(1, routed.chosen) if scores.shape == routed.logits.shape else scores
    factor = scores / probabilities(routed.logits, sigmoid=routers[0].sigmoid).gather(1, routed.chosen)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-5, atol=0)
    bias = routers[0].bias_name.rpartition(".")[0].partition("layers.")[2][2:] if routers[0].bias else ""
    assert (routers[0].sigmoid, bias) == SCORES[family]


def test_a_router_that_sorts_tokens_by_expert_is_read() -> None:
    """JetMoE's router does not return one row of experts for each token."""
    model = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model("jetmoe"), 1), dtype=torch.float32)
    (router, *_), outputs = find_routers(model), []
    router.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    routed = read(router, outputs[0])
    assert torch.equal(routed.chosen, routed.logits.topk(2, dim=-1).indices)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_of_probabilities_reach_the_logits(sigmoid: bool) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 4, dtype=torch.float64)
    (probabilities(logits, sigmoid=sigmoid) * weights).sum().backward()
    torch.testing.assert_close(to_logits(weights, logits.detach(), sigmoid=sigmoid), logits.grad)


def test_load_and_biases_resume_under_another_layout(tmp_path: Path) -> None:
    """The resume is bit-identical under the same layout. The checkpoint holds the load of all ranks and the biases that
    the load changes."""
    balance = ["moe=global_batch", "moe.coefficient=0.5", "moe.bias_update_rate=0.05", *DEEPSEEK]
    balance.append("model.config.num_hidden_layers=2")

    def overrides(layout: str) -> list[str]:
        return words_of("llama", layout, "fp64", 5, *balance, FOUR)

    alone, own = run_ranks(2, train_then_resume_each, overrides("fsdp"), str(tmp_path / "run"), [], 3)[0]
    assert sorted(own.lines) == [4, 5] and all(own.lines[step] == alone.lines[step] for step in own.lines)
    other = run_ranks(
        2, resume_each, [*overrides("pipeline")[:-1], "train.gradient_accumulation_steps=8"], [str(tmp_path / "run")], 2
    )[0][0]
    # The micro-batches have the same shape because the router's float32 matmul rounds differently for larger matrices.
    for step in (4, 5):
        assert (other.losses[step], other.grad_norms[step]) == pytest.approx(
            (alone.losses[step], alone.grad_norms[step]), rel=FLOAT64
        )
    saved = {}
    for file in tmp_path.rglob("step-*/*.safetensors"):
        saved |= load_file(file)
    gate = saved["buffer/model.layers.1.mlp.gate.e_score_correction_bias"]
    steps = gate / 0.05
    assert gate.any() and torch.equal(steps, steps.round()) and steps.abs().max() <= 3
    load = saved["buffer/moe.load"]
    # There are two layers, and each of the step's 8 x 32 tokens goes to two experts.
    assert load.shape == (2, 4) and (load.sum(dim=1) == 2 * 8 * 32).all()
