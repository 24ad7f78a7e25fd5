"""The cases of `tests.gpu.all`, in order of importance. Imports only the standard library.

parity   one process on the GPU against one on the CPU in float64, from the same weights
memory   predicted against measured: runs of one process, and single ranks of simulated worlds
speed    tokens per second against a bare loop and transformers' Trainer; bandwidths
pages    commands of a user: a trace, a memory snapshot, a resumed run, a page that compares layouts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case.

    call: name of a function in `run.CALLS`.
    words: overrides.
    options: further options of that function.
    limit: time limit in seconds.
    shared: whether the case is small enough to share the GPU.
    predicted: whether the memory of these overrides is estimated too.
    needs: distribution without which the case is skipped.
    """

    name: str
    part: str
    call: str
    words: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    limit: float = 60.0
    shared: bool = False
    predicted: bool = False
    needs: str = ""

    @property
    def key(self) -> str:
        return f"{self.part}: {self.name}"


PAGED = "optimizer.paged=true"
RECOMPUTE, CHUNKED = "train.activation_checkpointing=full", "train.chunked_loss=true"
PROBE = Case(name="machine", part="machine", call="probe", limit=90)
EXACT, SINGLE, NEAR = 1e-8, 1e-4, 2e-2
"""Limits: relative distance in float64, relative distance in float32, absolute loss difference in fewer bits."""


def cases(device: str) -> list[Case]:
    """All cases, with unique keys.

    device: cuda, or cpu for tiny shapes.
    """
    if device == "cpu":
        return [*_small_parity(), *_small_memory(), *_small_speed(), *_pages(["model=tiny", "data.seq_len=64"])]
    memory, speed, pages = list(_memory()), list(_speed()), list(_pages(["model=gpt2", "precision=bf16"]))
    # The most important cases of each kind come first, so each table has its main rows however little time there is.
    return [*_parity(), *memory[:14], *speed[:5], *pages, *memory[14:33], *speed[5:8], *memory[33:], *speed[8:]]


def parity(
    name: str,
    *words: str,
    limit: float = SINGLE,
    by: str = "loss",
    seconds: float = 45,
    needs: str = "",
    **options: Any,
) -> Case:
    """A case of parity.

    limit: largest distance allowed.
    by: quantity that the limit applies to, see `run.parity`.
    seconds: time limit.
    against (option): overrides of the reference on the CPU in float64.
    """
    options = {"limit": limit, "by": by, "model": "llama", "against": (), **options}
    about: dict[str, Any] = {"options": options, "limit": seconds, "needs": needs}
    return Case(name=name, part="parity", call="parity", words=words, shared=True, **about)


def _parity() -> Iterator[Case]:
    # The compiled case comes first: it takes longest, and the others can share the GPU with it.
    yield parity("compiled layers, fp32", "precision=fp32", "train.compile=true", seconds=120)
    for model in ("llama", "gpt2", "qwen3"):
        yield parity(f"single, {model}, fp64", "precision=fp64", limit=EXACT, by="all", model=model)
    yield parity("fsdp, fp64", "parallel=fsdp", limit=EXACT, by="all")
    # The reference also balances, and its router computes in float32. Experts run one by one in float64, and through
    # grouped kernels in 16 bits.
    balance = ("moe=global_batch", "moe.coefficient=0.1", "moe.z_loss=0.01")
    experts: dict[str, Any] = {"model": "qwen3_moe", "against": balance}
    yield parity("qwen3_moe, balanced, fp64", *balance, "precision=fp64", limit=SINGLE, **experts)
    yield parity("qwen3_moe, balanced, bf16", *balance, "precision=bf16", **experts | {"limit": NEAR, "by": "near"})
    for stage in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero1_offload"):
        yield parity(f"{stage}, fp32", f"parallel={stage}", "precision=fp32")
    compiled = ("parallel=zero2_offload", "optimizer.implementation=deepspeed_cpu", "precision=fp32")
    yield parity("zero2_offload, fp32, DeepSpeedCPUAdam", *compiled, seconds=150)
    yield parity("single, fp32, fused AdamW", "precision=fp32", "optimizer.implementation=fused")
    yield parity("single, bf16", "precision=bf16", limit=NEAR, by="near")
    yield parity("single, fp16", "precision=fp16", "precision.loss_scale_init=1024", limit=NEAR, by="near")
    yield parity("single, tf32", "precision=tf32", limit=NEAR, by="near")
    yield from _float8("tensorwise", "rowwise")
    yield parity("fsdp, bf16", "parallel=fsdp", "precision=bf16", limit=NEAR, by="near")
    yield parity("zero3, bf16", "parallel=zero3", "precision=bf16", limit=NEAR, by="near")
    yield parity(
        "zero2, fp16", "parallel=zero2", "precision=fp16", "precision.loss_scale_init=1024", limit=NEAR, by="near"
    )
    yield parity("flash kernel, bf16", "precision=bf16", limit=NEAR, by="near", kernel="FLASH_ATTENTION")
    yield parity("cuDNN kernel, bf16", "precision=bf16", limit=NEAR, by="near", kernel="CUDNN_ATTENTION")
    yield parity("efficient kernel, fp32", "precision=fp32", model="gpt2", kernel="EFFICIENT_ATTENTION")
    yield parity("chunked loss, fp64", CHUNKED, limit=EXACT, by="all")
    # Its softmax computes in float32 at any precision, here and in the reference.
    yield parity("eager attention", "model.attention=eager", against=("model.attention=eager",))
    recompute = "train.activation_checkpointing"
    yield parity(
        "full recompute, accumulation, fp64", f"{recompute}=full", "train.gradient_accumulation_steps=2", limit=EXACT
    )
    yield parity("selective recompute, fp64", f"{recompute}=selective", limit=EXACT)
    for name in ("adamw_8bit", "adafactor"):
        words = (f"optimizer={name}", "precision=fp64")
        yield parity(f"{name}, fp64", *words, limit=EXACT, by="all", against=words)
    # The reference has the same states, but not paged.
    pages: dict[str, Any] = {"limit": EXACT, "by": "all", "model": "tall", "needs": "bitsandbytes"}
    for name, layout in (("adamw", "single"), ("adamw_8bit", "single"), ("adamw_8bit", "fsdp")):
        words = (f"optimizer={name}", "precision=fp64")
        yield parity(f"{name}, paged, {layout}", *words, PAGED, f"parallel={layout}", against=words, **pages)
    exact = ("optimizer=muon", "optimizer.options.dtype=float64")
    yield parity("muon, fp64", *exact, "precision=fp64", limit=EXACT, by="all", against=exact)
    rounded = ("optimizer=muon", "precision=fp32")
    yield parity("muon, fp32, iterated in bf16", *rounded, limit=NEAR, by="near", against=rounded)
    for tuning in ("lora", "qlora"):
        words = (f"tuning={tuning}", "tuning.rank=4", "precision=fp32", "optimizer=sgd", "optimizer.lr=0.3")
        yield parity(f"{tuning}, fp32, first loss", *words, by="first", against=words)


def _float8(*recipes: str) -> Iterator[Case]:
    for recipe in recipes:
        words = ("precision=fp8", f"precision.float8.recipe={recipe}")
        yield parity(f"single, fp8 {recipe}", *words, limit=NEAR, by="near", needs="torchao")


def _small_parity() -> Iterator[Case]:
    yield parity("single, llama, fp64", "precision=fp64", limit=EXACT, by="all")
    yield from _float8("tensorwise")
    yield parity("single, bf16", "precision=bf16", limit=NEAR, by="near")


EIGHT_B = ("model=llama3_1_8b", "model.config.num_hidden_layers=8")
"""The 8B model with a quarter of its layers. It fits on one GPU with AdamW in float32."""


def memory(name: str, *words: str, limit: float = 40, needs: str = "") -> Case:
    words = ("data.seq_len=1024", *words)
    return Case(name=name, part="memory", call="memory", words=words, limit=limit, predicted=True, needs=needs)


def fake(name: str, rank: int, world: int, *words: str, limit: float = 60) -> Case:
    options = {"rank": rank, "world": world}
    return Case(name=name, part="memory", call="fake", words=words, options=options, limit=limit, predicted=True)


def _memory() -> Iterator[Case]:
    one, long, b = "model=llama3_2_1b", "data.seq_len=2048", "train.micro_batch_size"
    yield memory("1B, bf16", one, "precision=bf16", f"{b}=4")
    yield memory("8B shape, bf16, recompute", *EIGHT_B, "precision=bf16", long, f"{b}=4", RECOMPUTE)
    yield from _ranks(first=True)
    fixed = "cluster.expandable_segments=false"
    yield memory("1B, bf16, segments that do not grow", one, "precision=bf16", f"{b}=4", fixed)
    yield memory("gpt2, bf16", "model=gpt2", "precision=bf16", f"{b}=8")
    yield memory("1B, fp32", one, "precision=fp32", f"{b}=4")
    yield memory("1B, zero3, bf16", one, "parallel=zero3", "precision=bf16", f"{b}=4")
    yield memory("1B, zero2_offload, bf16", one, "parallel=zero2_offload", "precision=bf16", f"{b}=4")
    yield memory("8B, qlora, bf16", "model=llama3_1_8b", "tuning=qlora", "precision=bf16", long, f"{b}=1", RECOMPUTE)
    # These need more memory than a card has, by various amounts, for cards with 80 GB and with 141 GB.
    yield memory("8B, fp32, recompute", "model=llama3_1_8b", "precision=fp32", long, f"{b}=1", RECOMPUTE)
    yield memory("gpt2, bf16, batch 80", "model=gpt2", "precision=bf16", f"{b}=80")
    yield memory("gpt2, bf16, batch 144", "model=gpt2", "precision=bf16", f"{b}=144")
    yield memory("1B, bf16, chunked loss", one, "precision=bf16", f"{b}=8", CHUNKED)
    # Combinations, each with another setting that changes memory.
    yield memory("1B, fp16", one, "precision=fp16", f"{b}=2", "precision.loss_scale_init=128")
    yield memory("1B, tf32", one, "precision=tf32", f"{b}=2", RECOMPUTE)
    yield memory("1B, sgd, bf16", one, "optimizer=sgd", "precision=bf16", f"{b}=2")
    yield memory("1B, muon, bf16", one, "optimizer=muon", "precision=bf16", f"{b}=2")
    yield memory("1B, adafactor, bf16", one, "optimizer=adafactor", "precision=bf16", f"{b}=2")
    yield memory("1B, adamw_8bit, bf16", one, "optimizer=adamw_8bit", "precision=bf16", f"{b}=4")
    for optimizer in ("adamw", "adamw_8bit"):
        words = (f"optimizer={optimizer}", PAGED, "precision=bf16", f"{b}=4")
        yield memory(f"1B, {optimizer}, paged, bf16", one, *words, needs="bitsandbytes")
    yield memory("1B, selective recompute", one, "precision=bf16", f"{b}=4", "train.activation_checkpointing=selective")
    yield memory("1B, fsdp, bf16", one, "parallel=fsdp", "precision=bf16", f"{b}=4")
    yield memory("1B, zero1, bf16", one, "parallel=zero1", "precision=bf16", f"{b}=4")
    yield memory("1B, zero2, bf16", one, "parallel=zero2", "precision=bf16", f"{b}=4")
    yield memory("1B, zero3_offload, bf16", one, "parallel=zero3_offload", "precision=bf16", f"{b}=4")
    yield memory("1B, zero2, fp32", one, "parallel=zero2", "precision=fp32", f"{b}=2", RECOMPUTE)
    yield memory("1B, lora, bf16", one, "tuning=lora", "precision=bf16", f"{b}=4")
    yield memory("8B, lora, bf16", "model=llama3_1_8b", "tuning=lora", "precision=bf16", long, f"{b}=1", RECOMPUTE)
    yield memory("1B, eager attention", one, "model.attention=eager", "precision=bf16", f"{b}=2")
    yield memory("gpt2, fp32, batch 32", "model=gpt2", "precision=fp32", f"{b}=32")
    yield memory("gpt2, bf16, recompute, batch 64", "model=gpt2", "precision=bf16", f"{b}=64", RECOMPUTE)
    yield memory("gpt2, zero3, fp32", "model=gpt2", "parallel=zero3", "precision=fp32", f"{b}=8")
    yield from _ranks(first=False)
    yield memory(
        "gemma2 shape, bf16", "model=gemma2_2b", "model.config.num_hidden_layers=8", "precision=bf16", f"{b}=2"
    )
    yield memory("qwen3 shape, bf16", "model=qwen3_8b", "model.config.num_hidden_layers=6", "precision=bf16", f"{b}=2")
    yield memory("8B shape, bf16", *EIGHT_B, "precision=bf16", long, f"{b}=2", CHUNKED)
    yield memory("8B shape, compiled", *EIGHT_B, "precision=bf16", long, f"{b}=2", "train.compile=true", limit=90)
    thirty = ("model=qwen3_30b_a3b", "model.config.num_hidden_layers=4")
    yield memory("30B-A3B shape, bf16", *thirty, "precision=bf16", f"{b}=2", RECOMPUTE)
    yield memory("1B, compiled", one, "precision=bf16", f"{b}=4", "train.compile=true", limit=90)
    yield memory("1B, fp8", one, "precision=fp8", f"{b}=4", needs="torchao")
    yield memory("1B, accumulation", one, "precision=bf16", f"{b}=2", "train.gradient_accumulation_steps=4")
    yield memory("1B, fp32, batch 8 of 2,048", one, "precision=fp32", f"{b}=8", long)
    yield memory("gpt2, bf16, batch 62", "model=gpt2", "precision=bf16", f"{b}=62")
    yield memory("gpt2, bf16, batch 1", "model=gpt2", "precision=bf16", f"{b}=1")


LARGE = ("precision=bf16", "data.seq_len=4096", "train.micro_batch_size=1", RECOMPUTE)
TENSOR = ("parallel=tensor", "parallel.tp=8", "parallel.sequence_parallel=true")
IN_THREE = (
    "parallel=3d",
    "parallel.pp=8",
    "parallel.tp=8",
    "parallel.dp_replicate=1",
    "parallel.sequence_parallel=true",
)
PIPELINE = ("parallel=pipeline", "parallel.pp=4", "train.gradient_accumulation_steps=8")
SHARDED_PIPELINE = (
    "parallel=pipeline_fsdp",
    "parallel.pp=4",
    "parallel.dp_shard=8",
    "train.gradient_accumulation_steps=8",
)


def _ranks(*, first: bool) -> Iterator[Case]:
    """Single ranks of simulated worlds."""
    eight, seventy, steps = "model=llama3_1_8b", "model=llama3_1_70b", "train.gradient_accumulation_steps=8"
    if first:
        yield fake("8B, fsdp on 8, rank 0", 0, 8, eight, "parallel=fsdp", *LARGE)
        yield fake("70B, tp 8 x pp 8, rank 0", 0, 64, seventy, *IN_THREE, steps, *LARGE)
        return
    yield fake("8B, fsdp_offload on 8, rank 0", 0, 8, eight, "parallel=fsdp_offload", *LARGE)
    yield fake("8B, tp 8 + sp, rank 0", 0, 8, eight, *TENSOR, *LARGE)
    yield fake("70B, fsdp on 64, rank 0", 0, 64, seventy, "parallel=fsdp", *LARGE)
    thirty = "model=qwen3_30b_a3b"
    yield fake("30B-A3B, fsdp on 8, rank 0", 0, 8, thirty, "parallel=fsdp", *LARGE)
    yield fake("30B-A3B, ep 8, rank 0", 0, 8, thirty, "parallel=expert_fsdp", "parallel.ep=8", *LARGE)
    yield fake("8B, pp 4, rank 0", 0, 4, eight, *PIPELINE, *LARGE)
    yield fake("8B, pp 4, rank 3", 3, 4, eight, *PIPELINE, *LARGE)
    yield fake("70B, pp 4 x fsdp 8, rank 8", 8, 32, seventy, *SHARDED_PIPELINE, *LARGE)
    yield fake("70B, tp 8 x pp 8, rank 24", 24, 64, seventy, *IN_THREE, steps, *LARGE)
    yield fake("70B, tp 8 x pp 8, rank 63", 63, 64, seventy, *IN_THREE, steps, *LARGE)
    yield fake("8B, context 8, rank 0", 0, 8, eight, "parallel=context", "parallel.cp=8", *LARGE, "data.seq_len=16384")


def _small_memory() -> Iterator[Case]:
    tiny = ("model=tiny", "data.seq_len=64", "precision=bf16")
    yield memory("tiny, zero3, bf16", *tiny, "train.micro_batch_size=2", "parallel=zero3", "estimate.measure=true")
    heads = ("model.config.num_attention_heads=8", "model.config.num_key_value_heads=8", "train.micro_batch_size=1")
    accumulate = "train.gradient_accumulation_steps=8"
    in_three = ("parallel=3d", "parallel.pp=4", "parallel.tp=2", "parallel.dp_replicate=1", accumulate)
    yield fake("tiny, fsdp on 8, rank 0", 0, 8, *tiny, *heads, "parallel=fsdp")
    yield fake("tiny, tp 2 x pp 4, rank 5", 5, 8, *tiny, *heads, *in_three)


def speed(name: str, call: str, *words: str, limit: float = 60, needs: str = "", **options: Any) -> Case:
    return Case(name=name, part="speed", call=call, words=words, options=options, limit=limit, needs=needs)


def _speed() -> Iterator[Case]:
    long, b = "data.seq_len=4096", "train.micro_batch_size"
    one = ("model=llama3_2_1b", "precision=bf16", "data.seq_len=2048", f"{b}=4")
    eight = (*EIGHT_B, "precision=bf16", long)
    compiled = "train.compile=true"
    yield speed("8B shape, compiled", "speed", *eight, f"{b}=2", compiled, CHUNKED, limit=120)
    yield speed("bandwidths", "bandwidth", limit=30)
    yield speed("1B, against others", "versus", *one, limit=100)
    yield speed("8B shape, eager, chunked loss", "speed", *eight, f"{b}=2", CHUNKED)
    yield speed("8B shape, against others", "versus", *eight, f"{b}=1", limit=100)
    yield speed("1B, compiled, chunked loss", "speed", *one, compiled, CHUNKED, limit=120)
    yield speed("gpt2, against others", "versus", "model=gpt2", "precision=bf16", "data.seq_len=1024", f"{b}=8")
    yield speed("1B, zero2_offload", "speed", *one, "parallel=zero2_offload", seconds=4.0)
    yield speed("1B, compiled, against others", "versus", *one, compiled, limit=150)
    yield speed("8B shape, compiled, recompute", "speed", *eight, f"{b}=4", compiled, CHUNKED, RECOMPUTE, limit=120)
    yield speed(
        "8B, lora, recompute", "speed", "model=llama3_1_8b", "precision=bf16", long, f"{b}=2", "tuning=lora", RECOMPUTE
    )
    yield speed(
        "8B, qlora, recompute",
        "speed",
        "model=llama3_1_8b",
        "precision=bf16",
        long,
        f"{b}=2",
        "tuning=qlora",
        RECOMPUTE,
    )
    eighth = (*EIGHT_B, "precision=fp8", long)
    yield speed("8B shape, fp8, compiled", "speed", *eighth, f"{b}=2", compiled, CHUNKED, limit=120, needs="torchao")
    low = ("precision.master_dtype=bfloat16", "precision.reduce_dtype=bfloat16")
    yield speed(
        "8B, all in bf16, recompute",
        "speed",
        "model=llama3_1_8b",
        "precision=bf16",
        *low,
        long,
        f"{b}=1",
        RECOMPUTE,
        CHUNKED,
    )
    yield speed("1B, fsdp, against others", "versus", *one, "parallel=fsdp", limit=100)
    yield speed("1B, zero3_offload", "speed", *one, "parallel=zero3_offload", seconds=4.0)


def _small_speed() -> Iterator[Case]:
    yield speed(
        "tiny, against others", "versus", "model=tiny", "data.seq_len=32", "train.micro_batch_size=2", seconds=0.3
    )


def _pages(words: list[str]) -> Iterator[Case]:
    """Runs through the trainer's entry point. The option `into` names the run's folder."""
    once = (
        "train.steps=6",
        "checkpoint.every=0",
        "checkpoint.final=false",
        "train.export=false",
        "train.micro_batch_size=4",
        *words,
    )
    yield Case(
        name="a trace and a snapshot",
        part="pages",
        call="trace",
        words=(*once, "profile=true"),
        options={"into": "trace"},
    )
    yield Case(
        name="single", part="pages", call="run", words=(*once, "parallel=single"), options={"into": "compared/single"}
    )
    if "model=tiny" not in words:
        for layout in ("fsdp", "zero2"):
            run = {"into": f"compared/{layout}"}
            yield Case(name=layout, part="pages", call="run", words=(*once, f"parallel={layout}"), options=run)
    yield Case(name="the page that compares them", part="pages", call="compare", options={"into": "compared"})
    if "model=tiny" not in words:
        saved = (*once, "checkpoint.every=2", "checkpoint.final=true", "train.export=true")
        for kind, more in (("", ()), (" of paged states", ("optimizer=adamw_8bit", PAGED))):
            for end in (4, 6):
                yield Case(
                    name=f"checkpoints{kind}, to step {end}",
                    part="pages",
                    call="run",
                    words=(*saved, *more, f"train.steps={end}"),
                    options={"into": f"resumed{kind.replace(' ', '-')}", "resumed": end == 6},
                    needs="bitsandbytes" if more else "",
                )
