"""The work of a rank in a pipeline test, and the reference training in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from configs.load import load_config
from configs.schema import Config
from trainer.axes.pipeline.orders import Action, rank_orders
from trainer.axes.pipeline.run import PipelineRun
from trainer.axes.pipeline.timeline import receive_buffers
from trainer.data import IGNORED, Batch
from trainer.engine.torch import TorchEngine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, build_model
from trainer.model.filling import materialize
from trainer.model.loss import cross_entropy_sum
from trainer.model.roles import describe
from trainer.model.weights import RandomWeights
from trainer.optim.build import build_optimizer
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime, join_world
from trainer.run.step import train_step

STEPS, CLIP, LR = 4, 0.5, 1e-2
ROWS, SEQ_LEN, VOCABULARY = 2, 12, 67
SMALL = {
    "llama": ["model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=48"],
    "qwen3": ["model=tiny_qwen3", "model.config.hidden_size=32", "model.config.intermediate_size=48"],
    "gpt2": ["model=tiny_gpt2", "model.config.n_embd=32"],
    "gemma2": [
        "model=gemma2_2b",
        "model.config.hidden_size=32",
        "model.config.intermediate_size=48",
        "model.config.num_attention_heads=4",
        "model.config.num_key_value_heads=2",
        "model.config.head_dim=8",
        "model.config.sliding_window=4",
    ],
}


@dataclass(frozen=True)
class Case:
    """A training under a pipeline. Fields without a note are config keys of the same name.

    packed: whether a sequence holds several documents, each with positions from 0.
    spoil: planted defect.
    """

    schedule: str
    pp: int = 2
    dp_shard: int = 1
    micro_batches: int = 4
    model: str = "llama"
    layers: int = 5
    stages_per_rank: int | None = None
    split: tuple[int, ...] | None = None
    checkpointing: str = "none"
    precision: str = "fp64"
    packed: bool = False
    spoil: str = ""

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_shard

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config}  # composed by the test, not by each rank

    @functools.cached_property
    def config(self) -> Config:
        words = [
            f"parallel.pipeline.schedule={self.schedule}",
            f"parallel.pp={self.pp}",
            f"parallel.dp_shard={self.dp_shard}",
            f"precision={self.precision}",
            f"data.seq_len={SEQ_LEN}",
            f"train.micro_batch_size={ROWS // self.dp_shard}",
            f"train.gradient_accumulation_steps={self.micro_batches}",
            f"train.activation_checkpointing={self.checkpointing}",
        ]
        if self.stages_per_rank is not None:
            words.append(f"parallel.pipeline.stages_per_rank={self.stages_per_rank}")
        if self.split is not None:
            words.append(f"parallel.pipeline.split={list(self.split)}")
        return small_config(self.model, self.layers, *words)


@dataclass
class Outcome:
    """Results of a training.

    losses: loss of each step.
    grad_norms: gradient norm of each step, before clipping.
    validation: validation losses before and after training.
    parameters: full final parameters, on rank 0.
    copies: this rank's second copies of tied parameters.
    layers: range of layers of each of this rank's stages.
    """

    losses: list[float]
    grad_norms: list[float]
    validation: list[float]
    parameters: dict[str, torch.Tensor]
    copies: dict[str, torch.Tensor]
    layers: list[range]


def small_config(model: str, layers: int, *further: str) -> Config:
    number = "n_layer" if model == "gpt2" else "num_hidden_layers"
    words = [f"model.config.{number}={layers}", f"model.config.vocab_size={VOCABULARY}"]
    ends = ["model.config.bos_token_id=null", "model.config.eos_token_id=1"]
    training = [f"optimizer.lr={LR}", f"train.clip_grad_norm={CLIP}"]
    return load_config([*SMALL[model], *words, *ends, *training, *further])


def micro_batches(count: int, *, packed: bool = False) -> list[Batch]:
    """Random tokens, the same in every step, so that the model can learn them.

    The number of valid labels differs between micro-batches; the second has none.
    """
    random = torch.Generator().manual_seed(3)
    batches = []
    for number in range(count):
        tokens = torch.randint(0, VOCABULARY, (ROWS, SEQ_LEN + 1), generator=random)
        labels = tokens[:, 1:].clone()
        labels[0, : (3 * number) % SEQ_LEN] = IGNORED
        labels[1, number:] = IGNORED
        if number == 1:
            labels[:] = IGNORED
        first = torch.tensor([[1 + number % 5], [4 + number % 5]])  # tokens of each row's first document
        positions = torch.arange(SEQ_LEN).expand(ROWS, -1)
        positions = torch.where(positions < first, positions, positions - first)
        batches.append(Batch(tokens[:, :-1].clone(), labels, positions if packed else None))
    return batches


def validation_batch() -> Batch:
    """A batch whose shape differs from that of the micro-batches."""
    tokens = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone())


@functools.cache
def reference(model: str, layers: int, count: int, packed: bool = False) -> Outcome:
    """Train in one process with plain torch, in float64."""
    config = small_config(model, layers)
    plain = build_model(config.model, build_hf_config(config.model))
    materialize(plain, RandomWeights(plain, seed=0), device=torch.device("cpu"), dtype=torch.float64)
    optimizer = build_optimizer(plain.named_parameters(), describe(plain), config.optimizer)
    batches = micro_batches(count, packed=packed)
    valid_tokens = sum(batch.valid_tokens() for batch in batches)

    def loss_of(batch: Batch) -> torch.Tensor:
        logits = plain(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return cross_entropy_sum(logits, batch.labels)

    losses, norms = [], []
    with torch.no_grad():
        validation = [loss_of(validation_batch()).item()]
    for _ in range(STEPS):
        parts = [loss_of(batch) / valid_tokens for batch in batches]
        torch.stack(parts).sum().backward()
        losses.append(sum(part.item() for part in parts))
        norms.append(clip_grad_norm_(plain.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        validation.append(loss_of(validation_batch()).item())
    assert losses[-1] < losses[0] - 0.1, f"the reference did not train: {losses}"
    assert max(norms) > CLIP, "clipping was never active"
    return Outcome(losses, norms, validation, {n: p.detach() for n, p in plain.named_parameters()}, {}, [])


def train_pipelines(cases: list[Case]) -> list[Outcome]:
    """Train each case on this rank through the plan, the engine and the step."""
    with join_world(make_plan(cases[0].config, find_machine()), timeout_minutes=1) as runtime:
        return [_train(case, make_plan(case.config, find_machine()), runtime) for case in cases]


def _train(case: Case, plan: Plan, runtime: Runtime) -> Outcome:
    engine = TorchEngine(case.config, plan, runtime)
    assert engine.pipeline is not None
    actions = _recorded(engine.pipeline)
    _spoil(case.spoil, engine)
    rows = slice(plan.data_rank(runtime.rank), None, case.dp_shard)
    batches = [
        Batch(
            batch.input_ids[rows], batch.labels[rows], None if batch.position_ids is None else batch.position_ids[rows]
        )
        for batch in micro_batches(case.micro_batches, packed=case.packed)
    ]
    before = _validate(engine, case)
    results = [train_step(engine, batches, plan, runtime, LR) for _ in range(STEPS)]
    shape = {"pp": case.pp, "micro_batches": case.micro_batches, "stages_per_rank": case.stages_per_rank}
    rank = plan.coordinates(runtime.rank)["pp"]
    assert actions == STEPS * rank_orders(case.schedule, **shape)[rank], "torch ran another order than the table says"
    # torch 2.15 allocates a buffer when it posts a receive, and frees it itself.
    kept = 0 if Version(torch.__version__) >= Version("2.15") else receive_buffers(case.schedule, **shape)[rank]
    assert _buffers(engine.pipeline) == kept, "other buffers than the table says"
    return Outcome(
        losses=[result.loss for result in results],
        grad_norms=[result.report.grad_norm for result in results if result.report],
        validation=[before, _validate(engine, case)],
        parameters={name: value for name, value in engine.parameters() if value is not None},
        copies={name: _whole(parameter) for name, parameter in engine.copies.items()},
        layers=[stage.layers for stage in engine.pipeline.stages],
    )


def _validate(engine: TorchEngine, case: Case) -> float:
    loss = engine.evaluate(validation_batch()).double()
    dist.all_reduce(loss)
    return loss.item() / case.dp_shard


def _recorded(pipeline: PipelineRun) -> list[Action]:
    """A list to which every computation of torch's engine is appended when it starts."""
    actions: list[Action] = []
    for stage in _engine_stages(pipeline):
        for method, kind in (
            ("forward_one_chunk", "F"),
            ("backward_one_chunk", "B"),
            ("backward_weight_one_chunk", "W"),
        ):
            setattr(stage, method, _recording(getattr(stage, method), kind, stage.stage_index, actions))
    return actions


def _engine_stages(pipeline: PipelineRun) -> list[Any]:
    return getattr(pipeline.runner, "_stages", None) or [pipeline.runner._stage]


def _buffers(pipeline: PipelineRun) -> int:
    """Number of tensors that torch's engine has allocated for receives."""
    stages = _engine_stages(pipeline)
    rows = [row for stage in stages for row in (stage.args_recv_info, stage.grad_recv_info)]
    buffers = [getattr(info, "buffer", None) for row in rows for infos in row.values() for info in infos]
    return sum(map(len, pipeline.spare.values())) + sum(buffer is not None and not buffer.is_meta for buffer in buffers)


def _recording(method: Callable[..., Any], kind: str, stage: int, actions: list[Action]) -> Callable[..., Any]:
    def wrapped(micro_batch: int, *args: Any, **kwargs: Any) -> Any:
        halved = kind == "B" and not kwargs.get("full_backward", True)
        actions.append(Action("I" if halved else kind, stage, micro_batch))
        return method(micro_batch, *args, **kwargs)

    return wrapped


def _spoil(spoil: str, engine: TorchEngine) -> None:
    assert engine.pipeline is not None
    match spoil:
        case "":
            pass
        case "tied gradients not summed":
            engine.pipeline.sum_tied_gradients = lambda: None
        case "embedding counted twice in the norm":
            for name, copy in engine.copies.items():
                engine.named[f"copy of {name}"] = copy
                engine.parts.described[f"copy of {name}"] = engine.parts.described[name]
            engine.copies.clear()
        case "first stage trained on its last micro-batch only":
            for stage in engine.pipeline.stages:
                if stage.is_first:
                    stage.module.register_full_backward_pre_hook(lambda module, _: module.zero_grad())
        case _:
            raise ValueError(spoil)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
