"""Compares the trainer's step time with a hand-written loop and transformers' Trainer, in one run on the same model.

    python -m tests.benchmarks.overhead                                       one process
    torchrun --nproc-per-node 2 -m tests.benchmarks.overhead                  data parallel
    torchrun --nproc-per-node 2 -m tests.benchmarks.overhead parallel=fsdp    fully sharded
    python -m tests.benchmarks.overhead model=llama3_2_1b precision=bf16      on a GPU

Rounds of the contenders alternate, so a slowdown of the machine affects all of them. The ratio is that of the median
step times. Arguments are overrides, as for the trainer. `rounds=` and `steps=` set the length, and
`page=docs/one-process.md` writes the table there. transformers' Trainer shards on GPUs only, so the fully sharded
comparison leaves it out on a CPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from configs.load import load_config
from configs.schema import Config
from tests.support.measured import conditions, write
from trainer.axes.fsdp import sharded_modules
from trainer.data import Batch
from trainer.data.build import build_data
from trainer.engine import build_engine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, build_model, decoder_layers
from trainer.model.filling import materialize
from trainer.model.precision import autocast, torch_dtype
from trainer.model.roles import describe
from trainer.model.weights import open_weights
from trainer.optim.build import build_optimizer
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime, join_world
from trainer.run.step import train_step

Contender = Callable[[int], float]
"""Runs the given number of steps and returns their seconds, without the setup before the first step."""

DEFAULTS = ["data=synthetic", "train.steps=1000000", "scheduler=constant", "train.micro_batch_size=8"]


def main(words: list[str]) -> None:
    mine = dict(word.split("=") for word in words if word.startswith(("rounds=", "steps=", "page=")))
    rounds, steps = int(mine.get("rounds", 5)), int(mine.get("steps", 10))
    overrides = [word for word in words if word.split("=")[0] not in mine]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    layout = "ddp" if ranks > 1 else "single"
    config = load_config([*DEFAULTS, f"parallel={layout}", *overrides])
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=10) as runtime:
        contenders = {"hand-written loop": by_hand(config, plan, runtime), "this trainer": by_us(config, plan, runtime)}
        if plan.device == "cuda" or not plan.fully_sharded:
            contenders["transformers Trainer"] = by_transformers(config, plan, runtime)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for step in contenders.values():
            step(2)
        for _ in range(rounds):
            for name, step in contenders.items():
                seconds[name].append(step(steps) / steps)
        if runtime.is_main:
            text = table(config.model.preset, plan, seconds)
            print(text)
            if page := mine.get("page"):
                start = f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python"
                write(Path(page), " ".join([f"{start} -m tests.benchmarks.overhead", *overrides]), text)


def table(model: str, plan: Plan, seconds: dict[str, list[float]]) -> str:
    """Median step times of the contenders, their tokens per second, and their ratio to the hand-written loop."""
    layout = "FSDP2" if plan.fully_sharded else "DDP" if plan.world_size > 1 else "one process"
    gpu = f", {torch.cuda.get_device_name()}" if plan.device == "cuda" else ""
    base = statistics.median(seconds["hand-written loop"])
    lines = [
        f"{conditions('torch', 'transformers')}{gpu}: `model={model}`, {layout}, ranks: {plan.world_size}.",
        "",
        "| | ms per step | tokens/s | time over the hand-written loop |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, found in seconds.items():
        median = statistics.median(found)
        lines.append(f"| {name} | {median * 1e3:.1f} | {plan.batch.tokens / median:,.0f} | {median / base:.3f} |")
    return "\n".join(lines) + "\n"


def by_hand(config: Config, plan: Plan, runtime: Runtime) -> Contender:
    """The shortest loop with the same arithmetic: forward, loss, backward, clip, update.

    FSDP groups and DDP communication are those of the trainer: they are settings of torch, not part of a loop.
    """
    model = _model(config, plan, runtime)
    called = model
    if config.train.compile:
        for layer in decoder_layers(model):
            layer.compile()
    if plan.fully_sharded:
        policy = MixedPrecisionPolicy(torch_dtype(plan.param_dtype), torch_dtype(plan.reduce_dtype))
        for group in (*sharded_modules(model).values(), model):
            fully_shard(group, mp_policy=policy, reshard_after_forward=plan.reshard_after_forward)
    elif plan.world_size > 1:
        called = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    optimizer = build_optimizer(model.named_parameters(), describe(model), config.optimizer)
    batches = _batches(config, plan, runtime)

    def run(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            batch = next(batches)[0].to(runtime.device)
            with nullcontext() if plan.fully_sharded else autocast(plan):
                logits = called(input_ids=batch.input_ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        return time.perf_counter() - begin

    return run


def by_us(config: Config, plan: Plan, runtime: Runtime) -> Contender:
    engine = build_engine(config, plan, runtime)
    batches = _batches(config, plan, runtime)

    def run(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            train_step(engine, next(batches), plan, runtime, config.optimizer.lr)
        return time.perf_counter() - begin

    return run


def by_transformers(config: Config, plan: Plan, runtime: Runtime) -> Contender:
    model = _model(config, plan, runtime)
    batches = _batches(config, plan, runtime)

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                batch: Batch = next(batches)[0]
                for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                    # The Trainer shifts the labels itself.
                    yield {"input_ids": ids, "labels": torch.cat([ids[:1], labels[:-1]])}

    class Clock(TrainerCallback):
        """Measures the training only, since each round builds a new Trainer."""

        def on_train_begin(self, *_, **__) -> None:
            self.begin = time.perf_counter()

        def on_train_end(self, *_, **__) -> None:
            self.seconds = time.perf_counter() - self.begin

    def run(steps: int) -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=plan.batch.micro_batch_size,
                learning_rate=config.optimizer.lr,
                lr_scheduler_type="constant",
                max_grad_norm=config.train.clip_grad_norm,
                bf16=str(plan.param_dtype) == "bfloat16",
                fsdp=plan.fully_sharded,  # pyright: ignore[reportArgumentType]
                torch_compile=config.train.compile,
                use_cpu=plan.device == "cpu",
                save_strategy="no",
                report_to=[],
                ddp_find_unused_parameters=False,
                disable_tqdm=True,
                logging_strategy="no",
            )
            Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock]).train()
        return clock.seconds

    return run


def _model(config: Config, plan: Plan, runtime: Runtime):
    model = build_model(config.model, build_hf_config(config.model))
    weights = open_weights(config.model, model, seed=config.train.seed)(model)
    materialize(model, weights, device=runtime.device, dtype=torch_dtype(plan.master_dtype))
    return model.train()


def _batches(config: Config, plan: Plan, runtime: Runtime):
    data = build_data(config, plan, data_rank=plan.data_rank(runtime.rank), vocab_size=_vocabulary(config))
    return data.steps()


def _vocabulary(config: Config) -> int:
    return build_hf_config(config.model).vocab_size


if __name__ == "__main__":
    main(sys.argv[1:])
