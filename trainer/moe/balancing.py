"""The load of every expert, counted over a step, and the routers' terms of its loss.

    before the first forward    tokens of the step, without padding                        one number is all-reduced
    each router, each forward   counts, and the term at its logits (`attach`)              nothing, but see `sequence`
    after the last backward     counts and values of the terms, over all ranks             one all-reduce
    after the update            the load of the step before, and the routers' own biases   nothing

A layer that recompute runs twice is counted once, in the first run. Ranks that share tokens (tensor parallel) compute
the same term, and one of them counts; pipeline stages have their own routers and add up the loss together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from configs.errors import ConfigError
from configs.schema import Config
from trainer import moe
from trainer.axes import CONTEXT, TENSOR
from trainer.data import Batch
from trainer.inputs import tokens_before
from trainer.moe.attach import attach, recomputing
from trainer.moe.bias import Biases
from trainer.moe.routers import Router, find_routers, probabilities, read, to_logits, wide
from trainer.moe.seen import MicroBatch, Seen, Step, Term, micro_batch
from trainer.plan.plan import Plan

SAVED = "moe.load"
"""Name in a checkpoint: the load of the previous step."""


class Balancing:
    """State of all modules on this rank. A `Step` before the first one is for traces, which have none."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        model: PreTrainedModel,
        modules: Sequence[PreTrainedModel],
        group: Any,
        tensor: DeviceMesh | None,
    ) -> None:
        """model: the whole model. modules: the model, or its pipeline stages. group: ranks whose modules get parts of
        the same sequences, if any. tensor: ranks whose routers each get an equal part of their module's tokens, if any.
        Raises ConfigError for a model that lacks what the config needs."""
        routers = find_routers(model)
        _check(config, model, routers)
        self.kind, self.z_loss = moe.KINDS.get(config.moe.balance), config.moe.z_loss
        self.coefficient = moe.coefficient(config, model.config.get_text_config()) or 0.0
        self.rate = config.moe.bias_update_rate
        self.plan, self.group, self.tensor, self.before = plan, group, tensor, tokens_before(config)
        numbers = {router.name: number for number, router in enumerate(routers)}
        self.shape = len(routers), max(router.experts for router in routers)
        self.load = torch.zeros(self.shape, dtype=torch.float64)
        self.step = Step(tokens=1, sequences=1, micro_batches=1, load=self.load)
        self.factor = 1.0
        self.lengths: list[torch.Tensor | None] = []
        self._clear(torch.device("cpu"))
        copies = [[router] for router in routers]
        self.places: list[_Place] = []
        for module in modules:
            place = _Place(self)
            self.places.append(place)
            module.register_forward_pre_hook(place.begin, with_kwargs=True)
            for router in find_routers(module):
                number = numbers[router.name]
                router.module.register_forward_hook(place.at(number, router), prepend=True)
                if router.module is not routers[number].module:
                    copies[number].append(router)
        self.biases = Biases(copies)

    def begin(self, micro_batches: Sequence[Batch], *, factor: float) -> None:
        """Before the first forward of a step. micro_batches: as this rank's modules get them. factor: multiplier of the
        loss before its backward. A collective."""
        device = micro_batches[0].input_ids.device
        self.factor, self.lengths = factor, [batch.lengths for batch in micro_batches]
        self._clear(device)
        self.biases.keep_wide()
        tokens = sum(
            batch.input_ids.numel() if batch.lengths is None else batch.lengths.sum() for batch in micro_batches
        )
        # Ranks that hold the same tokens have the same count.
        alike = self.plan.same_data // self.plan.degree(CONTEXT)
        total = torch.as_tensor(tokens, device=device).double() / alike
        dist.all_reduce(total)
        batch = self.plan.batch
        self.step = Step(
            tokens=max(1.0, round(total.item())),
            sequences=batch.global_batch_size,
            micro_batches=batch.gradient_accumulation_steps * batch.data_parallel_size,
            load=self.load.to(device),
            whole_sequences=self._whole_sequences,
        )

    def finish(self, rank: int) -> torch.Tensor:
        """After the last backward of a step. Returns this rank's share of the terms in the loss (float64, without the
        factor). A collective."""
        for place in self.places:
            place.flush()
        layers, experts = self.shape
        if self.tensor is not None:
            for tensor in (self.counts, self.values, self.squares):
                dist.all_reduce(tensor, group=self.tensor.get_group())
        if self.plan.coordinates(rank)[TENSOR] == 0:
            share = self.coefficient * self.values.sum() + self.z_loss * self.squares.sum()
        else:
            for tensor in (self.counts, self.values, self.squares):
                tensor.zero_()
            share = self.values.sum()
        together = torch.cat([self.counts.flatten().double(), self.values, self.squares])
        dist.all_reduce(together)
        counts, self.values, self.squares = together.split([layers * experts, layers, layers])
        self.counts = counts.view(layers, experts)
        return share

    def commit(self) -> None:
        """Called after this step's update."""
        self.load = self.counts.cpu().clone()
        if self.rate:
            self.biases.update(self.counts, self.rate)

    def report(self) -> dict[str, float]:
        """Logged values of the finished step, the same on all ranks."""
        uneven = self.counts.amax(dim=1) / self.counts.mean(dim=1).clamp(min=1e-9)
        found = {"load": uneven.mean().item(), "load_worst_layer": uneven.max().item()}
        if self.kind is not None:
            found["balance"] = (self.values.mean() if self.kind.PER_LAYER else self.values.sum()).item()
        if self.z_loss:
            found["z"] = self.squares.mean().item()
        return found

    def kept(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint, the same on all ranks. The biases are buffers of the model, and saved as such."""
        return {SAVED: self.load}

    def restore(self, read: Callable[[str], torch.Tensor | None]) -> None:
        """read: returns a buffer of a checkpoint, or None."""
        load = read(SAVED)
        if load is not None and tuple(load.shape) == self.shape:
            self.load = load.clone()
        for name, buffers in self.biases.named():
            if (saved := read(name)) is not None:
                for buffer in buffers:
                    buffer.copy_(saved.view_as(buffer))

    def routed(self, layer: int, router: Router, output: Any, micro_batch: MicroBatch) -> Any:
        """The router's output, with the terms attached. Used in a training forward."""
        found = read(router, output)
        acts = (self.kind is not None or self.z_loss > 0) and found.logits.requires_grad
        gradient = None
        if not recomputing():
            gradient = self._count(layer, router, found.logits.detach(), found.chosen, micro_batch)
        if not acts:
            return output
        scores = attach(output[found.scores], found.logits, gradient)
        return type(output)([scores if place == found.scores else value for place, value in enumerate(output)])

    @torch.no_grad()
    def _count(
        self, layer: int, router: Router, logits: torch.Tensor, chosen: torch.Tensor, micro_batch: MicroBatch
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        sequences, length = micro_batch.shape
        experts, device = logits.shape[-1], logits.device
        counted = micro_batch.counted
        counts = count(chosen, counted, sequences=sequences, experts=experts)
        self.counts[layer, :experts] += counts.sum(dim=0)
        weights = None
        if self.kind is not None:
            shares = probabilities(logits, sigmoid=router.sigmoid).view(sequences, length, experts)
            seen = Seen(
                layer=layer,
                top_k=chosen.shape[-1],
                counts=counts,
                sums=_total(shares, counted),
                lengths=micro_batch.lengths(device),
                micro_batch=micro_batch.shared,
            )
            weights = self.kind.weights(seen, self.step)
            micro_batch.terms.append((layer, weights, seen.sums))
        if self.z_loss:
            squares = torch.logsumexp(wide(logits), dim=-1).square().view(sequences, length)
            squares = squares if counted is None else squares * counted
            self.squares[layer] += squares.sum().double() / self.step.tokens
        factor, tokens = self.factor, self.step.tokens

        def gradient(logits: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(wide(logits))
            if weights is not None:
                each = (factor * self.coefficient * weights()).to(total)
                each = each[:, None].expand(sequences, length, experts).reshape(total.shape)
                total += to_logits(each, logits, sigmoid=router.sigmoid)
            if self.z_loss:
                shares, root = torch.softmax(wide(logits), dim=-1), torch.logsumexp(wide(logits), dim=-1, keepdim=True)
                total += (2 * factor * self.z_loss / tokens) * root * shares
            return total if counted is None else total * counted.reshape(-1, 1)

        return gradient

    def add(self, terms: list[Term]) -> None:
        """The values of terms whose forward has finished."""
        for layer, weights, sums in terms:
            self.values[layer] += (weights() * sums).sum().double()

    def _whole_sequences(self, counts: torch.Tensor) -> torch.Tensor:
        for group in (self.group, self.tensor and self.tensor.get_group()):
            if group is not None:
                dist.all_reduce(counts, group=group)
        return counts

    def _clear(self, device: torch.device) -> None:
        self.counts = torch.zeros(self.shape, dtype=torch.int64, device=device)
        self.values, self.squares = (torch.zeros(self.shape[0], dtype=torch.float64, device=device) for _ in range(2))
        for place in getattr(self, "places", ()):
            place.clear()


class _Place:
    """The hooks of one module: they track its current micro-batch. Every schedule runs them in their order."""

    def __init__(self, balancing: Balancing) -> None:
        self.balancing = balancing
        self.clear()

    def clear(self) -> None:
        self.number, self.now = 0, MicroBatch((1, 1))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        inputs: torch.Tensor = args[0] if args else kwargs["input_ids"]
        self.flush()
        lengths = self.balancing.lengths
        of_this = lengths[self.number] if self.number < len(lengths) else None
        tensor = self.balancing.tensor
        part = (0, 1) if tensor is None else (tensor.get_local_rank(), tensor.size())
        self.now = micro_batch(inputs, of_this, before=self.balancing.before, part=part)
        self.number += 1

    def at(self, layer: int, router: Router) -> Callable[..., Any]:
        def hook(module: nn.Module, args: object, output: Any) -> Any:
            if not (module.training and torch.is_grad_enabled()):
                return output
            return self.balancing.routed(layer, router, output, self.now)

        return hook

    def flush(self) -> None:
        self.balancing.add(self.now.terms)
        self.now.terms.clear()


def count(chosen: torch.Tensor, counted: torch.Tensor | None, *, sequences: int, experts: int) -> torch.Tensor:
    """[sequences, experts]: number of each sequence's tokens that went to each expert. chosen: [tokens, k]. counted:
    [sequences, seq_len], 0 for padding."""
    rows = torch.arange(sequences, device=chosen.device).repeat_interleave(chosen.shape[0] // sequences)
    places = (chosen + experts * rows[:, None]).flatten()
    ones = torch.ones_like(chosen) if counted is None else counted.reshape(-1, 1).to(chosen.dtype).expand_as(chosen)
    total = torch.zeros(sequences * experts, dtype=chosen.dtype, device=chosen.device)
    return total.scatter_add_(0, places, ones.flatten()).view(sequences, experts)


def _total(shares: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    return (shares if counted is None else shares * counted[:, :, None]).sum(dim=1)


def _check(config: Config, model: PreTrainedModel, routers: list[Router]) -> None:
    """Raise ConfigError if the model lacks what the config needs."""
    name, asked = type(model).__name__, config.moe
    problems = list(moe.check_flag({**vars(model.config), **vars(model.config.get_text_config())}))
    if asked.balance in moe.KINDS and moe.coefficient(config, model.config.get_text_config()) is None:
        problems.append(
            f"moe.coefficient=null: the config of {name} says none; give one, such as moe.coefficient=0.001"
        )
    if asked.bias_update_rate and not all(router.bias is not None for router in routers):
        problems.append(
            f"moe.bias_update_rate={asked.bias_update_rate}: the routers of {name} have no bias that corrects them; use"
            " moe=global_batch"
        )
    if problems:
        raise ConfigError(*problems)


def build_balancing(
    config: Config,
    plan: Plan,
    model: PreTrainedModel,
    modules: Sequence[PreTrainedModel],
    group: Any,
    tensor: DeviceMesh | None,
) -> Balancing | None:
    """Like `Balancing`; None for a model without routers. Raises ConfigError if the config balances them anyway."""
    if not find_routers(model):
        if moe.acts(config):
            raise ConfigError(f"{moe.asked(config)}: {type(model).__name__} has no routed experts; leave it out")
        return None
    return None if config.train.compile else Balancing(config, plan, model, modules, group, tensor)
