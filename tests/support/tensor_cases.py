"""The work of a rank in a tensor-parallel test: a few AdamW steps by the engine's rules, without the engine."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.choices import Checkpointing, TuningMethod
from configs.errors import CookbookError
from configs.schema import Model, Tuning
from trainer.axes import gradients
from trainer.axes.tensor import check as tensor_check
from trainer.axes.tensor import collectives, vocabulary
from trainer.axes.tensor.apply import TensorParallel, apply_tensor_parallel, tensor_plan
from trainer.axes.tensor.collectives import Ranks
from trainer.data import IGNORED
from trainer.linear.adapter_layers import add_adapters, insert_adapters
from trainer.linear.adapter_targets import find_targets
from trainer.linear.values import TunedWeights
from trainer.model.build import build_hf_config, build_model, held_layers, tied_names
from trainer.model.filling import materialize
from trainer.model.loss import cross_entropy_sum
from trainer.model.weights import RandomWeights
from trainer.recompute import apply_checkpointing

STEPS, ACCUMULATION, ROWS, SEQ_LEN, CLIP, LR = 4, 2, 2, 16, 0.5, 1e-2
ADAPTERS, ADAPTERS_LR = Tuning(method=TuningMethod.lora, rank=4, alpha=16), 0.4
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
}
OLDER: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama_tied_odd_vocabulary": {**LLAMA, "tie_word_embeddings": True, "vocab_size": 61},
    "llama_one_kv_head": {**LLAMA, "num_key_value_heads": 1},
    "llama_two_kv_heads": {**LLAMA, "num_key_value_heads": 2},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 6},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8},
    "phi3": {**LLAMA, "model_type": "phi3"},
    "gemma3": {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3n": {
        **{**LLAMA, "model_type": "gemma3n_text", "head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
        **{
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
        },
        **{"laurel_rank": 8, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    },
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {**OLDER, "model_type": "gpt2", **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
    "gpt2_dropout": {**OLDER, "model_type": "gpt2"},
    "gptj": {**OLDER, "model_type": "gptj", "rotary_dim": 4},
    "bloom": {"model_type": "bloom", "vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        **{key: LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings")},
        **{"model_type": "opt", "vocab_size": 61, "ffn_dim": 48, "num_attention_heads": 4, "dropout": 0.0},
        **{"word_embed_proj_dim": 32, "pad_token_id": 1},
    },
}


@dataclass(frozen=True)
class Case:
    """One tensor-parallel training.

    adapters: whether to train adapters only.
    bug: planted bug, a name in BUGS.
    seeds: dropout seeds of the ranks; rank r uses number r modulo their count.
    """

    model: str
    sequence_parallel: bool = False
    recompute: bool = False
    adapters: bool = False
    bug: str = "none"
    seeds: tuple[int, ...] = (0,)


@dataclass
class Trained:
    """Results of a training.

    losses: loss of each step.
    grad_norms: gradient norm of each step, before clipping.
    parameters: full parameters by name.
    stored: number of parameter elements on this rank.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    stored: int = 0


def train(cases: list[Case]) -> list[Trained]:
    """Train each case on all ranks, with tensor parallelism if there are several."""
    mesh = world()
    return [_train(case, mesh) for case in cases]


def world() -> DeviceMesh:
    dist.init_process_group("gloo")
    # Some norms and routers compute in `x.float()`, whose rounding would hide small errors, so keep float64.
    narrow = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype is torch.float64 else narrow(x)  # type: ignore[method-assign]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("pp", "tp"))


def build(model: str) -> PreTrainedModel:
    choice = Model(architecture=MODELS[model])
    config = build_hf_config(choice)
    # The packed expert kernels do not support float64.
    config._experts_implementation = "eager"
    return build_model(choice, config)


def _train(case: Case, mesh: DeviceMesh) -> Trained:
    model, tensor = build(case.model), None
    if case.adapters:
        add_adapters(model, replace(ADAPTERS, dropout=0.1 if case.model == "gpt2_dropout" else 0.0))
    if mesh["tp"].size() > 1:
        plan = tensor_plan(model, mesh["tp"].size())
        tensor = apply_tensor_parallel(model, plan, mesh["tp"], sequence_parallel=case.sequence_parallel)
    if case.recompute:
        apply_checkpointing(model, Checkpointing.full)
    weights = TunedWeights(RandomWeights(model, seed=0), ADAPTERS, seed=0)
    materialize(model, weights, device=torch.device("cpu"), dtype=torch.float64)
    model.train()
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    torch.manual_seed(case.seeds[dist.get_rank() % len(case.seeds)])
    parameters = dict.fromkeys(trained.values())
    # Adam would amplify rounding errors: it divides the small gradients of a new adapter by small moments.
    sgd = torch.optim.SGD(parameters, ADAPTERS_LR)
    optimizer = sgd if case.adapters else torch.optim.AdamW(parameters, LR, foreach=True)
    result = Trained(stored=sum(gradients.local(p).numel() for p in model.parameters()))
    batches = list(_batches(model.config.vocab_size))
    tokens = sum(int((labels != IGNORED).sum()) for _, labels in batches)
    with patch.object(
        TensorParallel, "reduce_partial_gradients", BUGS[case.bug](TensorParallel.reduce_partial_gradients)
    ):
        for _ in range(STEPS):
            loss = _accumulate(model, tensor, batches, tokens, every=case.bug == "summed at every micro-batch")
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = gradients.global_norm(grads, mesh=mesh, device=torch.device("cpu"))
            gradients.scale(grads, min(1.0, CLIP / (norm + 1e-6)))
            optimizer.step()
            optimizer.zero_grad()
            result.losses.append(loss)
            result.grad_norms.append(norm)
    result.parameters = {name: _whole(p) for name, p in trained.items()}
    return result


def _accumulate(
    model: PreTrainedModel, tensor: TensorParallel | None, batches: list[Any], tokens: int, *, every: bool
) -> float:
    loss_fn, total = tensor.loss if tensor else cross_entropy_sum, 0.0
    for ids, labels in batches:
        loss = loss_fn(model(input_ids=ids, use_cache=False).logits, labels) / tokens
        loss.backward()
        total += loss.item()
        if tensor and every:
            tensor.reduce_partial_gradients(model)
    if tensor and not every:
        tensor.reduce_partial_gradients(model)
    return total


BUGS: dict[str, Any] = {
    "none": lambda original: original,
    "never summed": lambda original: lambda self, model: None,
    "summed at every micro-batch": lambda original: original,
}


def _batches(vocabulary: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of one step, with ragged numbers of valid labels and with padding tokens."""
    generator = torch.Generator().manual_seed(1)
    for number in range(ACCUMULATION):
        ids = torch.randint(vocabulary, (ROWS, SEQ_LEN), generator=generator)
        ids[0, :2] = 3
        labels = ids.roll(-1, dims=1)
        for row in range(ROWS):
            labels[row, : 5 * row + 3 * number] = IGNORED
        yield ids, labels


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def losses_of_divided_logits(vocabulary_size: int, dtype: torch.dtype, slice_elements: int) -> tuple[float, ...]:
    """Relative differences of loss and gradient between vocabulary-parallel and full logits."""
    ranks = Ranks(world().get_group("tp"))
    generator = torch.Generator().manual_seed(0)
    whole = (torch.randn(3, 7, vocabulary_size, generator=generator, dtype=torch.float64) * 20).to(dtype)
    labels = torch.randint(vocabulary_size, (3, 7), generator=generator)
    labels[0, 2:] = IGNORED
    labels[2] = IGNORED
    words = vocabulary.part_of(vocabulary_size, ranks)
    part = whole[..., words.start : words.stop].clone().requires_grad_()
    whole.requires_grad_()
    expected = cross_entropy_sum(whole, labels)
    (3 * expected).backward()
    with patch.object(vocabulary, "WIDE_ELEMENTS", slice_elements):
        found = vocabulary.cross_entropy_sum(ranks, vocabulary_size)(part, labels)
        (3 * found).backward()
    assert found.dtype is expected.dtype
    assert part.grad is not None and whole.grad is not None
    far = (part.grad - whole.grad[..., words.start : words.stop]).abs().max()
    return abs(found.item() / expected.item() - 1), (far / whole.grad.abs().max()).item()


def collectives_of_a_step(model_name: str, sequence_parallel: bool) -> tuple[Counter[str], Counter[str]]:
    """Calls of each collective in a forward with loss, and in its backward."""
    mesh = world()
    model = build(model_name)
    tensor = apply_tensor_parallel(model, tensor_plan(model, 2), mesh["tp"], sequence_parallel=sequence_parallel)
    materialize(model, RandomWeights(model, seed=0), device=torch.device("cpu"), dtype=torch.float32)
    ids, labels = next(_batches(model.config.vocab_size))
    with _counted() as forward:
        loss = tensor.loss(model(input_ids=ids, use_cache=False).logits, labels)
    with _counted() as backward:
        loss.backward()
    return forward, backward


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()

    def counting(name: str, original: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return collective

    with (
        patch.object(dist, "all_reduce", counting("all_reduce", dist.all_reduce)),
        patch.object(collectives, "_gather", counting("all_gather", collectives._gather)),
        patch.object(collectives, "_scatter", counting("reduce_scatter", collectives._scatter)),
    ):
        yield counts


def checked(
    model: str, user_plan: dict[str, str], sequence_parallel: bool, tuning: Tuning | None = None
) -> tuple[str, list[str]]:
    """The message of the start-up check about a plan ("" if it passes), and its warnings."""
    mesh = world()
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    tensor_check.log.addHandler(handler)
    plain = build(model)

    def convert(small: PreTrainedModel) -> None:
        if tuning is not None:
            insert_adapters(small, tuning, find_targets(small, tuning, strict=False))

    try:
        plan = tensor_plan(plain, 2, user_plan)
        tensor_check.self_check(plain.config, plan, mesh["tp"], sequence_parallel=sequence_parallel, convert=convert)
    except CookbookError as error:
        return str(error), warnings
    return "", warnings


def checked_without_sums(model: str) -> str:
    """The message of the start-up check if gradients of adapters on column-parallel matrices are not summed."""
    with patch.object(TensorParallel, "reduce_partial_gradients", BUGS["never summed"](None)):
        return checked(model, {}, sequence_parallel=False, tuning=ADAPTERS)[0]


def ties(model_name: str) -> dict[str, str]:
    mesh = world()
    model = build(model_name)
    apply_tensor_parallel(model, tensor_plan(model, 2), mesh["tp"], sequence_parallel=False)
    return tied_names(model)


def refused(fields: dict[str, Any]) -> str:
    """The error of `apply_tensor_parallel` for a model with these config fields ("" if there is none)."""
    mesh = world()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    try:
        apply_tensor_parallel(model, tensor_plan(model, 2), mesh["tp"], sequence_parallel=False)
    except CookbookError as error:
        return str(error)
    return ""


def compiled_losses(model_name: str) -> tuple[list[float], int]:
    """Losses of one batch, uncompiled and with each layer compiled, and the number of graph breaks."""
    mesh = world()
    losses = []
    for compiled in (False, True):
        model = build(model_name)
        tensor = apply_tensor_parallel(model, tensor_plan(model, 2), mesh["tp"], sequence_parallel=True)
        materialize(model, RandomWeights(model, seed=0), device=torch.device("cpu"), dtype=torch.float64)
        if compiled:
            for layer in held_layers(model):
                layer.compile(backend="aot_eager", fullgraph=True)
        ids, labels = next(_batches(model.config.vocab_size))
        loss = tensor.loss(model(input_ids=ids, use_cache=False).logits, labels)
        loss.backward()
        losses.append(loss.item())
    return losses, sum(torch._dynamo.utils.counters["graph_break"].values())


def checked_types(types: list[str]) -> dict[str, str]:
    """The message of the start-up check for the plan of each model type, and a module that the plan shards."""
    from tests.zoo.tiny import tiny

    mesh, found = world()["tp"], {}
    for model_type in types:
        try:
            model = build_model(Model(path=model_type), tiny(model_type))
            plan, config = tensor_plan(model, mesh.size()), model.config
            apply_tensor_parallel(model, plan, mesh, sequence_parallel=False)
            tensor_check.self_check(config, plan, mesh, sequence_parallel=False)
            found[model_type] = ""
        except CookbookError as error:
            found[model_type] = str(error)
    return found


def checked_without_ours(model_type: str) -> str:
    """The message of the check for transformers' own plan."""
    with patch.dict("trainer.axes.tensor.apply.PLANS", {model_type: {}}):
        return checked_types([model_type])[model_type]
