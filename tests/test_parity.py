"""Every layout equals one process: loss and gradient norm at each step, validation loss and parameters at the end.

The tests run in float64, where real bugs show (a skipped all-reduce, a mean of means, a lost micro-batch) and rounding
does not, and again in float32. All of them have ragged valid tokens, active clipping and a vocabulary that the ranks do
not divide evenly. The layouts are the files of configs/parallel: a new file fails here until it has a row.

Every change trains each layout, and each pair of axes that a plan allows, with the models that it may treat
differently. Tests that only repeat this for another model, size or precision are nightly.
"""

from __future__ import annotations

from itertools import combinations, pairwise, product
from pathlib import Path

import pytest

import configs
from configs.load import load_config
from tests.support.cases import train, train_compiled
from tests.support.harness import run_ranks
from tests.support.parity import MIXTURES, MODELS, distance, measure, reference, words
from tests.support.selection import rows
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

FLOAT64 = 1e-10
FLOAT32 = 1e-5
STEPS = 4
nightly = pytest.mark.nightly
ACCUMULATE = ("train.gradient_accumulation_steps=2",)

# preset -> (processes, models tested with every change); the other models are nightly. test_parity_deepspeed has the
# rows of DeepSpeed. Each axis is combined with llama, here or in a variant, and with a tied embedding (gpt2, qwen3).
# Sharded matrices also have head norms (qwen3) and Conv1D (gpt2); split sequences also have learned positions (gpt2).
TORCH: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (2, ("llama",)),
    "fsdp": (2, ("llama",)),
    "fsdp_offload": (2, ("qwen3",)),
    "hsdp": (4, ("gpt2",)),
    "tensor": (2, ("qwen3", "gpt2")),
    "tensor_data": (4, ("gpt2",)),
    "tensor_fsdp": (4, ("qwen3",)),
    "pipeline": (2, ("gpt2",)),
    "pipeline_data": (4, ("qwen3",)),
    "pipeline_fsdp": (4, ("llama",)),
    "3d": (8, ("gpt2",)),
    "3d_zero1": (8, ("llama",)),
    "context": (2, ("gpt2",)),
    "expert": (4, ("qwen3_moe",)),
    "expert_fsdp": (4, ("mixtral",)),
}
DIVIDED_EXPERTS = {"expert", "expert_fsdp"}
VARIANTS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "ddp on 4": ("ddp", 4, ()),
    "fsdp on 4": ("fsdp", 4, ()),
    "fsdp, parameters kept gathered": ("fsdp", 2, ("parallel.reshard_after_forward=false",)),
    "fsdp on 4, gathered ahead and from fewer ranks": (
        "fsdp",
        4,
        ("parallel.fsdp.reshard_size=2", "parallel.fsdp.forward_prefetch=2", "parallel.fsdp.backward_prefetch=2"),
    ),
    "tensor on 4, key-value heads copied": ("tensor", 4, ("parallel.tp=4",)),
    "tensor, sequence parallel": ("tensor", 2, ("parallel.sequence_parallel=true",)),
    "tensor_fsdp, sequence parallel": ("tensor_fsdp", 4, ("parallel.sequence_parallel=true",)),
    "tensor_fsdp, sequence parallel, recompute": (
        "tensor_fsdp",
        4,
        ("parallel.sequence_parallel=true", "train.activation_checkpointing=full"),
    ),
    "pipeline on 4": ("pipeline", 4, ("parallel.pp=4", "train.gradient_accumulation_steps=4")),
    "pipeline, recompute": ("pipeline", 2, ("train.activation_checkpointing=full",)),
    "pipeline_fsdp, gathered again": ("pipeline_fsdp", 4, ("parallel.reshard_after_forward=true",)),
    "3d_zero1, sequence parallel, recompute": (
        "3d_zero1",
        8,
        ("parallel.sequence_parallel=true", "train.activation_checkpointing=full"),
    ),
    "3d_zero1, interleaved": ("3d_zero1", 8, ("parallel.pipeline.schedule=interleaved_1f1b",)),
    "context, keys and values gathered": ("context", 2, ("parallel.context_method=gather",)),
    "context on 4, with tensor parallel": ("context", 4, ("parallel.tp=2",)),
    "context on 4, with a pipeline": ("context", 4, ("parallel.pp=2",)),
    "context on 4, sharded over data as well": ("context", 4, ("parallel.dp_shard=2",)),
}
# Variants for MoE models: ranks that share tokens exchange them, or sum the results if the whole expert group shares
# them. Other variants have replicas, pipeline stages or split sequences.
MIXED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tensor parallel": ("qwen3_moe", "expert_fsdp", ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "tensor parallel inside the group": ("qwen3_moe", "expert", ("parallel.tp=2",)),
    "parts of the tokens of each rank": ("qwen3_moe", "expert", ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "tensor parallel, tokens that do not divide": (
        "mixtral",
        "expert_fsdp",
        ("parallel.dp_shard=1", "parallel.tp=4", "train.activation_checkpointing=full"),
    ),
    "a pipeline": ("qwen3_moe", "expert_fsdp", ("parallel.pp=2", "parallel.pipeline.schedule=interleaved_1f1b")),
    "divided sequences": ("qwen3_moe", "expert_fsdp", ("parallel.cp=2",)),
    "replicas": ("mixtral", "expert_fsdp", ("parallel.dp_replicate=2", "parallel.reshard_after_forward=false")),
}
# Nightly variants: other sizes of an axis, and combinations that a later variant contains too.
REPEATED = {
    *("ddp on 4", "fsdp on 4", "tensor_fsdp, sequence parallel", "pipeline, recompute", "3d_zero1, interleaved"),
    *("tensor, sequence parallel", "3d_zero1, sequence parallel, recompute", "fsdp, parameters kept gathered"),
}
REPEATED_MIXED = {"tensor parallel inside the group", "parts of the tokens of each rank"}
SCHEDULES = ["gpipe", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev"]
KEYS: dict[str, tuple[str, ...]] = {
    "no accumulation": (),
    "full recompute": ("train.activation_checkpointing=full",),
    "selective recompute": ("train.activation_checkpointing=selective",),
    "eager attention": ("model.attention=eager",),
    "sgd": ("optimizer=sgd", "optimizer.lr=0.5"),
    "no clipping": ("train.clip_grad_norm=0",),
    "loss in slices": ("train.chunked_loss=true",),
}
# (layout, key) pairs where the key runs the layout's own code: the end of accumulation, recompute hooks, sharded heads
# and logits, norms of shards. Every key has a row.
MEETS = {
    *(("ddp", "no accumulation"), ("ddp", "selective recompute"), ("fsdp", "full recompute"), ("fsdp", "sgd")),
    *(("fsdp", "no clipping"), ("tensor", "eager attention"), ("tensor", "loss in slices")),
}


MUON_KEYS = ("optimizer=muon", "optimizer.options.dtype=float64", "optimizer.lr=0.01")
EXPERTS = ("model.config.model_type=qwen3_moe", "model.config.num_experts=4", "model.config.num_experts_per_tok=2")
EXPERTS += ("model.config.moe_intermediate_size=32",)
MUON = [
    *(("tensor_fsdp", 4, "gpt2"), ("pipeline", 2, "gpt2"), ("expert_fsdp", 4, "experts")),
    pytest.param("fsdp", 2, "gpt2", marks=nightly),
    *(pytest.param(*row, marks=nightly) for row in (("hsdp", 4, "llama"), ("3d", 8, "llama"), ("ddp", 2, "gpt2"))),
    *(pytest.param(*row, marks=nightly) for row in (("ddp", 2, "experts"), ("fsdp", 2, "experts"))),
    *(pytest.param(*row, marks=nightly) for row in (("tensor", 2, "gpt2"), ("context", 2, "llama"))),
    pytest.param("3d_zero1", 8, "gpt2", marks=nightly),
]


SMOOTHED = ("train.label_smoothing=0.2", "train.neftune_alpha=1", "optimizer.ema=0.6", *ACCUMULATE)


# Optimizer -> (its keys, layouts tested with every change); the other layouts are nightly.
OPTIMIZERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adamw_8bit": (("optimizer=adamw_8bit", "optimizer.lr=0.01"), ("tensor_fsdp",)),
    "adafactor": (("optimizer=adafactor", "optimizer.lr=0.02"), ("ddp",)),
    "lion": (("optimizer=lion",), ()),
    "schedule_free": (("optimizer=schedule_free", "scheduler=constant"), ("fsdp",)),
    "groups by role": (
        (
            "optimizer.groups.embedding.lr=1e-3",
            "optimizer.groups.matrix.weight_decay=0.5",
            "optimizer.groups.vector.weight_decay=0.2",
        ),
        ("fsdp",),
    ),
    "an optimizer for each role": (
        (
            *MUON_KEYS,
            "optimizer.groups.embedding.name=adafactor",
            "optimizer.groups.vector.name=sgd",
            "optimizer.groups.vector.lr=0.1",
        ),
        ("tensor",),
    ),
    "custom": (("optimizer=custom", "optimizer.target=torch.optim.NAdam", "optimizer.lr=3e-3"), ("tensor",)),
}
CUT = {
    **{"ddp": "gpt2", "fsdp": "gpt2", "hsdp": "llama", "fsdp_offload": "llama", "tensor": "gpt2"},
    **{"tensor_fsdp": "gpt2", "pipeline": "gpt2", "context": "llama", "3d": "gpt2", "expert_fsdp": "mixtral"},
}


def test_every_layout_has_a_row() -> None:
    files = {file.stem for file in (Path(configs.__file__).parent / "parallel").glob("*.yaml")}
    deepspeed = {name for name in files if name.startswith("zero")}
    assert files - deepspeed - {"single"} == TORCH.keys()
    assert all(models for _, models in TORCH.values()), "a layout has nightly rows only"
    assert {key for _, key in MEETS} == KEYS.keys()


def test_every_pair_of_axes_has_a_row() -> None:
    """Every change tests each pair of axes that a plan can combine."""
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
    degrees = tuple(f"parallel.{axis}=" for axis in axes)
    often = [(layout, processes, ()) for layout, (processes, _) in TORCH.items()]
    varied = [row for name, row in VARIANTS.items() if name not in REPEATED]
    varied += [(layout, 4, keys) for name, (_, layout, keys) in MIXED.items() if name not in REPEATED_MIXED]
    often += [row for row in varied if any(key.startswith(degrees) for key in row[2])]
    found: set[tuple[str, str]] = set()
    for layout, processes, keys in often:
        overrides = words(
            "mixtral" if layout in DIVIDED_EXPERTS else "llama", layout, "fp64", STEPS, *ACCUMULATE, *keys
        )
        plan = make_plan(load_config(overrides), Machine(world_size=processes, local_world_size=processes))
        found |= set(combinations([axis for axis in axes if plan.degree(axis) > 1], 2))
    # No row combines replicas with context parallel: cp counts as sharding, so this is the same code as hsdp.
    assert found == set(combinations(axes, 2)) - {("dp_replicate", "cp")}


@pytest.mark.parametrize(
    ("layout", "model"),
    rows(
        ((layout, model) for layout in TORCH for model in (MIXTURES if layout in DIVIDED_EXPERTS else MODELS)),
        lambda layout, model: model in TORCH[layout][1],
    ),
)
def test_layout_equals_single_process(layout: str, model: str) -> None:
    found = measure([layout], TORCH[layout][0], model=model, precision="fp64", steps=STEPS, extra=ACCUMULATE)
    assert found.largest <= FLOAT64, found


@pytest.mark.parametrize("variant", rows(zip(VARIANTS), lambda variant: variant not in REPEATED))
def test_variant_equals_single_process(variant: str) -> None:
    layout, processes, keys = VARIANTS[variant]
    found = measure([layout, *keys], processes, model="llama", precision="fp64", steps=STEPS, extra=ACCUMULATE)
    assert found.largest <= FLOAT64, found


@pytest.mark.parametrize("variant", rows(zip(MIXED), lambda variant: variant not in REPEATED_MIXED))
def test_divided_experts_with_another_axis_equal_single_process(variant: str) -> None:
    model, layout, keys = MIXED[variant]
    found = measure([layout, *keys], 4, model=model, precision="fp64", steps=3, extra=ACCUMULATE)
    assert found.largest <= FLOAT64, found


@pytest.mark.parametrize(("layout", "processes"), rows([("fsdp", 2), ("tensor_fsdp", 4)], lambda _, ranks: ranks == 2))
def test_experts_that_the_ranks_do_not_divide_equal_single_process(layout: str, processes: int) -> None:
    """FSDP shards the experts along their features. Sharded by expert, the last ranks would hold fewer experts or none.
    Muon still gets whole matrices."""
    extra = (*MUON_KEYS, *ACCUMULATE, *EXPERTS, "model.config.num_experts=3")
    found = measure([layout], processes, model="llama", precision="fp64", steps=4, extra=extra)
    assert found.largest <= FLOAT64, found


# test_pipeline_parallel tests every schedule with every change, including tied embeddings. This test adds the trainer's
# data and loss.
@pytest.mark.parametrize(
    ("schedule", "model"),
    rows(
        product(SCHEDULES, ("llama", "gpt2")),
        lambda schedule, model: model == "llama" and schedule == "zbv_zero_bubble",
    ),
)
def test_schedule_equals_single_process(schedule: str, model: str) -> None:
    keys = [f"parallel.pipeline.schedule={schedule}"]
    micro_batches = ("train.gradient_accumulation_steps=4",)
    found = measure(["pipeline", *keys], 2, model=model, precision="fp64", steps=5, extra=micro_batches)
    assert found.largest <= FLOAT64, found


@pytest.mark.parametrize("layout", rows(zip(TORCH), lambda layout: layout == "tensor"))
def test_float32_stays_within_rounding(layout: str) -> None:
    found = measure([layout], TORCH[layout][0], model="llama", precision="fp32", steps=STEPS, extra=ACCUMULATE)
    assert max(found.loss, found.grad_norm) <= FLOAT32, found


@pytest.mark.parametrize(("layout", "keys"), rows(product(("ddp", "fsdp", "tensor"), KEYS), lambda *row: row in MEETS))
def test_option_equals_single_process(layout: str, keys: str) -> None:
    found = measure([layout], 2, model="llama", precision="fp64", steps=5, extra=KEYS[keys])
    assert found.largest <= FLOAT64, found


@pytest.mark.parametrize(
    ("optimizer", "layout"), rows(product(OPTIMIZERS, CUT), lambda name, layout: layout in OPTIMIZERS[name][1])
)
def test_optimizer_equals_single_process(optimizer: str, layout: str) -> None:
    """test_sharded_states covers each kind of sharding."""
    extra = (*OPTIMIZERS[optimizer][0], *ACCUMULATE)
    # The gradient of GPT-2's key biases is only rounding error, and Lion would follow its sign.
    model = CUT[layout] if optimizer != "lion" else CUT[layout].replace("gpt2", "llama")
    found = measure([layout], TORCH[layout][0], model=model, precision="fp64", steps=4, extra=extra)
    assert found.largest <= FLOAT64, found


@pytest.mark.parametrize(
    ("layout", "keys"),
    rows(
        product(CUT, ((), ("train.chunked_loss=true",))),
        lambda layout, keys: not keys and layout in ("tensor", "pipeline"),
    ),
)
def test_smoothed_labels_noise_and_averaged_weights_equal_single_process(layout: str, keys: tuple[str, ...]) -> None:
    """Parameters and validation use the averaged weights. Validation has no smoothing and no noise."""
    extra = (*SMOOTHED, *keys)
    found = measure([layout], TORCH[layout][0], model="llama", precision="fp64", steps=STEPS, extra=extra)
    assert found.largest <= FLOAT64, found


@pytest.mark.parametrize(("layout", "processes", "model"), MUON)
def test_muon_equals_single_process(layout: str, processes: int, model: str) -> None:
    """Muon gets whole matrices under any sharding: packed and transposed matrices and a tied embedding (gpt2), and
    stacked experts."""
    extra = (*MUON_KEYS, *ACCUMULATE, *(EXPERTS if model == "experts" else ()))
    model = "llama" if model == "experts" else model
    found = measure([layout], processes, model=model, precision="fp64", steps=4, extra=extra)
    assert found.largest <= FLOAT64, found


def test_muon_in_bfloat16_stays_near_single_process() -> None:
    """A gradient summed in another order may round to the adjacent bfloat16 value before the iteration."""
    extra = ("optimizer=muon", "optimizer.lr=0.01", *ACCUMULATE)
    found = measure(["fsdp"], 2, model="gpt2", precision="fp32", steps=4, extra=extra)
    assert max(found.loss, found.grad_norm) <= 1e-4, found


@pytest.mark.parametrize(
    ("layout", "recompute"),
    rows(
        (
            *product(("single", "tensor", "tensor_fsdp"), ("none", "full")),
            *product(("single", "context"), ("selective",)),
        ),
        lambda *row: row in (("single", "none"), ("tensor", "full"), ("single", "selective")),
    ),
)
def test_compiled_layers_equal_plain_ones(layout: str, recompute: str) -> None:
    """torch traces the layers ahead of time but generates no code, because the C++ compiler would take minutes."""
    expected = reference("llama", "fp64", 3)
    keys = ("train.compile=true", f"train.activation_checkpointing={recompute}")
    processes = {"single": 1, "tensor": 2, "context": 2, "tensor_fsdp": 4}[layout]
    ranks = run_ranks(processes, train_compiled, words("llama", layout, "fp64", 3, *keys))
    found, graphs = ranks[0]
    assert graphs > 0, "nothing was compiled"
    assert distance(found, expected).largest <= FLOAT64


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recompute_changes_nothing(mode: str) -> None:
    plain = reference("llama", "fp64", 5)
    again = run_ranks(1, train, words("llama", "single", "fp64", 5, f"train.activation_checkpointing={mode}"))[0]
    assert again.losses == plain.losses
    assert again.grad_norms == plain.grad_norms


# Each axis is tested alone and all of them together. dtypes change at the edges of stages, regions and shards.
NARROW = {"single": 1, "ddp": 2, "fsdp": 2, "tensor": 2, "pipeline": 2, "context": 2, "3d": 8, "3d_zero1": 8}


# The nightly 3d layouts combine the axes of these layouts.
NARROW_OFTEN = {"bf16": ("fsdp", "context", "pipeline"), "fp16": ("tensor",)}


@pytest.mark.parametrize(
    ("precision", "tolerance", "layout"),
    rows(
        ((*precision, layout) for precision in (("bf16", 5e-3), ("fp16", 2e-3)) for layout in NARROW),
        lambda precision, _, layout: layout in NARROW_OFTEN[precision],
    ),
)
def test_16_bit_stays_near_float32(precision: str, tolerance: float, layout: str) -> None:
    expected = reference("llama", "fp32", STEPS)
    # With this scale, the float16 gradients of this model never overflow. A skipped step would change the run.
    keys = ("precision.loss_scale_init=1024",)
    found = run_ranks(NARROW[layout], train, words("llama", layout, precision, STEPS, *keys))[0]
    assert all(found.updated)
    assert found.losses != expected.losses, "nothing was computed in 16 bit"
    assert max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)) <= tolerance
    norms = zip(found.grad_norms, expected.grad_norms, strict=True)
    # Rounding changes the norm by about 5 %; an axis counted twice or not at all changes it by 40 %.
    assert max(abs(a - b) / b for a, b in norms) <= 0.1


@pytest.mark.parametrize(
    "layout",
    rows(
        zip(("single", "ddp", "fsdp", "tensor", "pipeline", "3d"), strict=True),
        lambda layout: layout in ("fsdp", "pipeline"),
    ),
)
def test_fp16_overflow_halves_the_scale_and_skips(layout: str) -> None:
    keys = ("precision.loss_scale_init=16777216", "precision.loss_scale_window=4", "train.clip_grad_norm=1.0")
    ranks = run_ranks(NARROW[layout], train, words("llama", layout, "fp16", 14, *keys))
    found = ranks[0]
    assert all((rank.updated, rank.loss_scales) == (found.updated, found.loss_scales) for rank in ranks)
    assert found.updated.count(False) > 0, "the first scale should overflow"
    expected, good_steps = [2.0**24], 0
    for updated in found.updated:
        good_steps = good_steps + 1 if updated else 0
        growth = 2.0 if good_steps and good_steps % 4 == 0 else 1.0
        expected.append(expected[-1] * (growth if updated else 0.5))
    assert max(b / a for a, b in pairwise(expected)) == 2.0, "4 good steps in a row double it"
    assert found.loss_scales == expected[:-1]
    assert found.losses[-1] < found.losses[0]
