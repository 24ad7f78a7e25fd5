"""The work of a rank of `python -m tests.zoo`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from configs.errors import CookbookError
from configs.schema import Config
from tests.support.cases import Trained, train
from tests.support.memory_cases import Measured, measure
from trainer.data.build import build_data
from trainer.engine import build_engine
from trainer.estimate.estimate import estimate
from trainer.make_plan import make_plan
from trainer.model.build import body_first, build_hf_config, text_config
from trainer.model.loss import cross_entropy_sum
from trainer.model.precision import torch_dtype
from trainer.plan.machine import Machine, find_machine
from trainer.process.runtime import join_world


def attempt(config: Config) -> Trained | str:
    """Train, and return the result or the text of a refusal."""
    _quietly()
    try:
        return train(config)
    except CookbookError as error:
        return " ".join(error.problems)


def predict(config: Config, world_size: int) -> tuple[int, int] | str:
    """Estimated bytes of the fullest rank at the peak and between steps, or the text of a refusal."""
    _quietly()
    try:
        plan = make_plan(config, Machine(world_size=world_size, local_world_size=world_size))
        found = estimate(config, plan)
    except CookbookError as error:
        return " ".join(error.problems)
    return found.busiest.peak_allocated_bytes, found.busiest.between_steps_bytes


def count(config: Config) -> Measured | str:
    """Measured bytes of tensors on this rank, or the text of a refusal."""
    _quietly()
    try:
        return measure(config)
    except CookbookError as error:
        return " ".join(error.problems)


def computes(folder: Path) -> tuple[str, str]:
    """The first precision of fp64 and fp32 in which transformers' own model runs forward and backward.

    Returns (precision, ""), or ("", reason) if it runs in neither.
    """
    _quietly()
    failed = ""
    for precision, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        try:
            model = _plain(AutoConfig.from_pretrained(folder), dtype)
            logits = model(input_ids=torch.randint(3, 250, (2, 32)), use_cache=False).logits
            cross_entropy_sum(logits[..., :261], torch.randint(3, 250, (2, 32))).backward()
        except Exception as error:  # an untested config of any architecture can raise anything
            failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        else:
            return precision, ""
    return "", failed


def _plain(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if dtype is torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the packed kernels do not support float64
    return model


def theirs(config: Config) -> tuple[float, float]:
    """Loss and gradient norm of step 1, from a model that transformers builds itself.

    It gets the parameter values of the trainer's model.
    """
    _quietly()
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        hf_config = build_hf_config(config.model)
        data = build_data(config, plan, data_rank=0, vocab_size=text_config(hf_config).vocab_size)
        values = {n: value for n, value in build_engine(config, plan, runtime).parameters() if value is not None}
        model = _plain(hf_config, torch_dtype(config.precision.param_dtype))
        body_first(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        batches = next(data.steps())
        tokens = sum(batch.valid_tokens() for batch in batches)
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
            loss = cross_entropy_sum(logits, batch.labels) / tokens
            loss.backward()
            total += loss.item()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return total, float(torch.nn.utils.get_total_norm(grads))


def _quietly() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
