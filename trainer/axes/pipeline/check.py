"""Start-up check of a pipeline: the stages, run one after the other, against the whole model, in miniature.

The probe shows how a model calls its layers, not what they compute: a layer that keeps values for a later one (keys and
values, chosen tokens) looks like any other. So a narrow copy, as deep as the model and split at the same layers, is
computed once whole and once stage by stage: logits and every gradient must agree. Every rank computes all of it.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import ConfigError, first_line
from trainer.axes.pipeline.probe import examine
from trainer.axes.pipeline.split import Stage, build_stage
from trainer.axes.pipeline.table import split_layers
from trainer.model.build import decoder_layers
from trainer.model.loss import cross_entropy_sum
from trainer.model.miniature import first_that_runs

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Relative to the largest. The stages compute the same sums in the same order; only sums over copies are rounded."""
SEED = 1234


def check_stages(config: PretrainedConfig, lengths: tuple[int, ...]) -> None:
    """Raise ConfigError if the stages would train another model. lengths: layers of each stage.

    An architecture whose small copy cannot run at all is left unchecked, with a warning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            model, (ids, expected) = first_that_runs(config, 1, _computed, deep=True)
        except Exception as error:  # a miniature config may break any rule of its architecture
            log.warning("stages not checked: a small %s does not run: %s", config.model_type, first_line(error))
            return
        depth = len(decoder_layers(model))
        ranges = split_layers(depth, min(len(lengths), depth), split=lengths if sum(lengths) == depth else None)
        try:
            model.zero_grad()
            anatomy = examine(model)
            stages = [build_stage(model, anatomy, ranges, index) for index in range(len(ranges))]
            problem = _difference(expected, _logits_and_gradients(stages, model, ids))
            # Some models do more in a validation (RWKV scales the weights of all its layers).
            with torch.no_grad():
                _logits([*map(_evaluating, stages)], ids)
        except ConfigError:
            raise
        except Exception as error:  # the model's own code, where a part is on another stage
            problem = f"a stage does not run: {first_line(error)}"
    if problem:
        raise ConfigError(
            f"parallel.pp: a {config.model_type} cannot be cut into stages of {', '.join(map(str, lengths))} layers:"
            f" {problem}; use parallel.pp=1"
        )


def _computed(model: PreTrainedModel) -> tuple[torch.Tensor, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, 16))
    return ids, _logits_and_gradients([], model, ids)


def _logits_and_gradients(
    stages: list[Stage], model: PreTrainedModel, ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of the stages or, without any, of the whole model. Copies of a parameter are summed."""
    torch.manual_seed(SEED)
    logits = _logits(stages, ids) if stages else model(input_ids=ids, use_cache=False).logits
    cross_entropy_sum(logits, ids.roll(-1, dims=1)).backward()
    gradients: dict[str, torch.Tensor] = {}
    modules: list[nn.Module] = [stage.module for stage in stages] or [model]
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients[name] + parameter.grad if name in gradients else parameter.grad
    return logits.detach(), gradients


def _logits(stages: list[Stage], ids: torch.Tensor) -> torch.Tensor:
    passed = ids
    for stage in stages:
        passed = stage.module(passed, **({"tokens": ids} if stage.repeated else {}))
    return passed


def _evaluating(stage: Stage) -> Stage:
    stage.module.eval()
    return stage


def _difference(
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]], found: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> str:
    """The first difference in the stages' results; empty if there is none."""
    logits, gradients = expected
    if not torch.allclose(found[0], logits, rtol=0, atol=TOLERANCE * logits.abs().max().item()):
        return "their logits are not those of the whole model, so a layer needs more of another than its hidden states"
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    wrong = [
        name
        for name in sorted(gradients.keys() | found[1].keys())
        if not _near(gradients.get(name), found[1].get(name), TOLERANCE * largest)
    ]
    return f"wrong gradient of {', '.join(wrong[:3])}" if wrong else ""


def _near(expected: torch.Tensor | None, found: torch.Tensor | None, limit: float) -> bool:
    one, other = (0 if value is None else value for value in (expected, found))
    return float(torch.as_tensor(one - other).abs().max()) <= limit
