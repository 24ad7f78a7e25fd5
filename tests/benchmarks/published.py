"""Compares the planner's predicted speeds with published speeds: how far its cost model can be trusted.

    python -m tests.benchmarks.published            prints the table, in seconds, without a GPU
    python -m tests.docs.write docs/planner.md      puts it into the page

The published speeds are those of other programs, with other kernels, compilers and overlap. The comparison shows
whether a few constants put the layouts of one cluster into the right order, and near the right speed.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from configs.load import load_config
from trainer.estimate.estimate import planned_device
from trainer.estimate.profiles import get_outline
from trainer.estimate.search.cost import StepTime, dimensions, step_time
from trainer.flops import flops
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.model_fields import keys_seen
from trainer.rules import config_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published run.

    words: overrides for the same run in this trainer.
    tokens: tokens per second and GPU.
    flops: FLOP/s per GPU, for sources that give these instead.
    """

    name: str
    source: str
    words: str
    tokens: float | None = None
    flops: float | None = None


HEAD = ("| run | predicted tokens/s/GPU | published | ratio | source |", "| --- | ---: | ---: | ---: | --- |")
TITAN = "torchtitan, docs/performance.md and benchmarks/, 2024"
LLAMA3 = "Grattafiori et al. 2024, arXiv:2407.21783, table 4"
KORTHIKANTI = "Korthikanti et al. 2022, arXiv:2205.05198, table 5"
FMS = "foundation-model-stack/fms-fsdp, README, 2024"
A100, H100 = "cluster=8xa100_80gb precision=bf16", "cluster=8xh100 precision=bf16"
META = (
    f"model=llama3_1_405b {H100} parallel=3d_zero1 parallel.tp=8 parallel.pp=16 parallel.sequence_parallel=true"
    " parallel.pipeline.schedule=interleaved_1f1b train.micro_batch_size=1 data.seq_len=8192"
)


def gpt(layers: int, hidden: int, heads: int) -> str:
    """A GPT of Megatron-LM's tables: vocabulary 51,200, sequences of 2,048, tensor parallel on the 8 GPUs of a node."""
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": 51200, "n_positions": 2048}
    words = " ".join(f"model.config.{key}={value}" for key, value in sizes.items())
    return f"model=gpt2 {words} {A100} data.seq_len=2048 parallel.tp=8 parallel.sequence_parallel=true"


RUNS = (
    Published(
        name="Llama 3 8B, FSDP on 64 A100",
        source=TITAN,
        words=f"model=llama3_1_8b {A100} cluster.nodes=8 cluster.network_gb_per_second=25 data.seq_len=8192"
        " parallel=fsdp train.micro_batch_size=1 train.activation_checkpointing=selective",
        tokens=2973,
    ),
    Published(
        name="Llama 3 70B, FSDP on 64 A100, full recompute",
        source=TITAN,
        words=f"model=llama3_1_70b {A100} cluster.nodes=8 cluster.network_gb_per_second=25 data.seq_len=8192"
        " parallel=fsdp train.micro_batch_size=1 train.activation_checkpointing=full",
        tokens=331,
    ),
    Published(
        name="Llama 3.1 8B, FSDP on 8 H100 (limited to 500 W)",
        source=TITAN,
        words=f"model=llama3_1_8b {H100} data.seq_len=8192"
        " parallel=fsdp train.micro_batch_size=2 train.activation_checkpointing=selective",
        tokens=5762,
    ),
    Published(
        name="Llama 2 7B, HSDP on 128 A100, compiled",
        source=FMS,
        words=f"model=llama2_7b {A100} cluster.nodes=16 cluster.network_gb_per_second=6.25 data.seq_len=4096"
        " parallel=hsdp parallel.dp_shard=8 train.micro_batch_size=2 train.compile=true",
        tokens=3700,
    ),
    Published(
        name="Llama 2 7B, HSDP on 96 H100, compiled",
        source=FMS,
        words=f"model=llama2_7b {H100} cluster.nodes=12 cluster.network_gb_per_second=12.5 data.seq_len=4096"
        " parallel=hsdp parallel.dp_shard=8 train.micro_batch_size=2 train.compile=true",
        tokens=7500,
    ),
    Published(
        name="Llama 3.1 405B, tp 8 x pp 16 x dp 64 on 8,192 H100",
        source=LLAMA3,
        words=f"{META} cluster.nodes=1024 train.gradient_accumulation_steps=32",
        flops=430e12,
    ),
    Published(
        name="Llama 3.1 405B, tp 8 x pp 16 x dp 128 on 16,384 H100",
        source=LLAMA3,
        words=f"{META} cluster.nodes=2048 train.gradient_accumulation_steps=16",
        flops=400e12,
    ),
    Published(
        name="GPT 22B, tp 8 on 8 A100",
        source=KORTHIKANTI,
        words=f"{gpt(48, 6144, 64)} parallel=tensor train.micro_batch_size=4",
        flops=0.415 * 312e12,
    ),
    Published(
        name="GPT 175B, tp 8 x pp 8 on 64 A100, interleaved",
        source=KORTHIKANTI,
        words=f"{gpt(96, 12288, 96)} cluster.nodes=8 parallel=3d parallel.pp=8 train.micro_batch_size=1"
        " parallel.pipeline.schedule=interleaved_1f1b parallel.pipeline.stages_per_rank=3"
        " train.gradient_accumulation_steps=64",
        flops=0.514 * 312e12,
    ),
    Published(
        name="GPT 1T, tp 8 x pp 64 on 512 A100",
        source=KORTHIKANTI,
        words=f"{gpt(128, 25600, 160)} cluster.nodes=64 parallel=3d parallel.pp=64 train.micro_batch_size=1"
        " train.gradient_accumulation_steps=512",
        flops=0.563 * 312e12,
    ),
)


def predict(run: Published) -> tuple[StepTime, float]:
    """The predicted step, and the ratio of predicted to published speed."""
    config, alone = load_config(run.words.split()), load_config(_alone(run))
    plan = make_plan(config, Machine(gpus=8))
    gpu = planned_device(config, plan).gpu
    assert gpu is not None
    outline = get_outline(alone, make_plan(alone, Machine(gpus=1)))
    size = dimensions(config_fields(config), outline, config.optimizer)
    time = step_time(config, plan, size, gpu)
    if run.tokens is not None:
        return time, time.tokens_per_second_per_gpu / run.tokens
    assert run.flops is not None
    keys = keys_seen(size.spans, config.data.seq_len)
    per_token = flops(matrices=size.matrices, attention=size.attention, keys=keys)
    return time, time.tokens_per_second_per_gpu * per_token.both / run.flops


def _alone(run: Published) -> list[str]:
    """Overrides for the same model in one process, which is used to count its parameters."""
    kept = [word for word in run.words.split() if word.startswith(("model", "data.", "precision", "cluster="))]
    return [*kept, "parallel=single", "cluster.gpus_per_node=1", "train.micro_batch_size=1"]


def table() -> str:
    """The predicted and published speed of every run, and the spread of the ratios."""
    lines = [*HEAD]
    ratios = []
    for run in RUNS:
        time, ratio = predict(run)
        ratios.append(ratio)
        found = time.tokens_per_second_per_gpu
        lines.append(f"| {run.name} | {found:,.0f} | {found / ratio:,.0f} | {ratio:.2f} | {run.source} |")
    spread = f"Median ratio {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}."
    return "\n".join([*lines, "", spread])


if __name__ == "__main__":
    print(table())
