"""The head in slices: logits, loss and gradients of a few tokens at a time, so no rank ever holds whole logits.

    hidden states [tokens, features]
      |   a slice of tokens:   logits = x W^T + b --> what the model does to its logits --> loss
      |                        gradient of the logits --> gradient of x, and W's adds up over the slices
      v
    the loss, whose backward only scales gradients that are there already

One slice holds SLICE_ELEMENTS logits (128 MiB in float32). The three matmuls are those of an undivided head, and a
sharded head is gathered once around all its slices. The model's own code changes its logits (soft-caps, scales, casts):
it runs once on `Deferred` logits, which only record the operations, and these are repeated on each slice. With a
divided vocabulary, each slice's loss is that of `axes.tensor.vocabulary`.

16-bit gradients of the weight accumulate over the slices in their own dtype, those of float16 in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from configs.errors import ConfigError
from trainer.model.layers import is_plain_linear
from trainer.model.loss import Loss

SLICE_ELEMENTS = 2**25
SCALE = {torch.float16: 8.0}
"""Multiplier for gradients of logits that are too small for their dtype."""


class Deferred(torch.Tensor):
    """Logits that are not computed: a record of the model's operations on them. step: the last operation; None for the
    head's own output. Shape and dtype are correct, but there is no memory."""

    step: Step | None
    shadow: torch.Tensor
    home: torch.device

    @staticmethod
    def of(shadow: torch.Tensor, step: Step | None, home: torch.device) -> Deferred:
        with _disable_current_modes():
            made = torch.Tensor._make_subclass(Deferred, shadow)
        made.step, made.shadow, made.home = step, shadow, home
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Deferred = _deferred((args, kwargs))[0]
        if func is torch.Tensor.device.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return first.home
        with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
            result = func(*tree_map(_shadow, args), **tree_map(_shadow, kwargs))
        changed = result is None or result is first.shadow
        if not changed and not isinstance(result, torch.Tensor):
            return result
        step = Step(func, tree_map(_noted, args), tree_map(_noted, kwargs))
        if changed:  # in place
            first.step = step
            return None if result is None else first
        assert result is not None
        return Deferred.of(result, step, first.home)


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One operation of the model's code. Arguments that were deferred logits are steps themselves, or HEAD."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any

    def run(self, logits: torch.Tensor, done: dict[int, torch.Tensor]) -> torch.Tensor:
        if id(self) not in done:

            def value(each: object) -> object:
                return logits if each is HEAD else each.run(logits, done) if isinstance(each, Step) else each

            args, kwargs = tree_map(value, self.args), tree_map(value, self.kwargs)
            result = self.function(*args, **kwargs)
            done[id(self)] = args[0] if result is None else result
        return done[id(self)]

    def trained(self) -> Iterator[torch.Tensor]:
        """Parameters of the model that the operations read."""
        found: list[torch.Tensor] = []

        def look(each: object) -> None:
            if isinstance(each, Step):
                found.extend(each.trained())
            elif isinstance(each, torch.Tensor) and each.requires_grad:
                found.append(each)

        tree_map(look, (self.args, self.kwargs))
        return iter({id(tensor): tensor for tensor in found}.values())


HEAD = object()
"""Placeholder in a step's arguments: the head's output."""


def _deferred(values: object) -> list[Deferred]:
    found: list[Deferred] = []
    tree_map(lambda each: found.append(each) if isinstance(each, Deferred) else None, values)
    return found


def _shadow(value: object) -> object:
    if isinstance(value, Deferred):
        return value.shadow
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _noted(value: object) -> object:
    return (value.step or HEAD) if isinstance(value, Deferred) else value


class Recorder(nn.Module):
    """Replaces the head in the model's code, and records its input."""

    hidden: torch.Tensor

    def __init__(self, head: nn.Module, entries: int) -> None:
        super().__init__()
        self.__dict__.update({"head": head, "entries": entries})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.__dict__["hidden"] = hidden
        with _disable_current_modes():  # an estimate's fake tensors
            shadow = torch.empty(*hidden.shape[:-1], self.__dict__["entries"], dtype=hidden.dtype, device="meta")
        return Deferred.of(shadow, None, hidden.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sliced:
    """Data that the head needs for the loss: labels [batch, seq_len], the loss of logits, and the model's operations on
    its logits before that. entries: see `trainer.model.objective`."""

    targets: torch.Tensor
    loss: Loss
    entries: int
    finish: Step | None

    @property
    def trained(self) -> list[torch.Tensor]:
        return list(self.finish.trained()) if self.finish is not None else []

    def of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(logits if self.finish is None else self.finish.run(logits, {}), labels)


def slice_head(model: nn.Module) -> None:
    """Let the model's head compute the loss when it is called with `sliced=`. Before it is divided: tensor parallel
    then wraps the call and replaces its weight. Raises ConfigError for a model without a head."""
    head = _head(model)
    inner, matrix = head.forward, head if is_plain_linear(head) else None

    def forward(hidden: torch.Tensor, *args: Any, sliced: Sliced | None = None, **kwargs: Any) -> torch.Tensor:
        if sliced is None:
            return inner(hidden, *args, **kwargs)
        return _any(head, inner, hidden, sliced) if matrix is None else _linear(matrix, hidden, sliced)

    head.forward = forward  # pyright: ignore[reportAttributeAccessIssue]


def call_sliced(
    model: nn.Module, run: Callable[[], Any], targets: torch.Tensor, loss: Loss, entries: int | None = None
) -> torch.Tensor:
    """The loss of a model whose head `slice_head` has prepared. run: calls the model, up to its logits."""
    head = _head(model)
    every = int(getattr(head, "out_features", 0)) or model.config.get_text_config().vocab_size  # pyright: ignore
    with _recording(model, Recorder(head, every)) as recorder:
        output = run()
    logits = output if isinstance(output, torch.Tensor) else output.logits
    hidden = recorder.__dict__.get("hidden")
    if (
        hidden is None
        or not isinstance(logits, Deferred)
        or not logits.shape[:-1] == hidden.shape[:-1] == targets.shape
    ):
        raise _refusal(model, "does not make its logits token by token there")
    sliced = Sliced(targets=targets, loss=loss, entries=entries or every, finish=logits.step)
    return head(hidden, sliced=sliced)


@contextmanager
def _recording(model: nn.Module, recorder: Recorder) -> Iterator[Recorder]:
    head = recorder.__dict__["head"]
    places = [(owner._modules, leaf) for owner in model.modules() for leaf, m in owner._modules.items() if m is head]
    for modules, leaf in places:
        modules[leaf] = recorder
    try:
        yield recorder
    finally:
        for modules, leaf in places:
            modules[leaf] = head


def _head(model: nn.Module) -> nn.Module:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise _refusal(model, "has no head of its own")
    return head


def _refusal(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"train.chunked_loss=true: computes the loss inside the model's head, and {type(model).__name__} {why};"
        " use train.chunked_loss=false"
    )


def slices(tokens: int, entries: int) -> Sequence[slice]:
    step = max(1, SLICE_ELEMENTS // entries)
    return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]


class _Sum:
    """A gradient that accumulates over slices. like: the tensor it belongs to."""

    def __init__(self, like: torch.Tensor) -> None:
        self.like, self.total = like, None
        self.wide = torch.float32 if like.dtype is torch.float16 else like.dtype

    def add(self, part: torch.Tensor | None) -> None:
        if part is not None:
            self.total = part.to(self.wide) if self.total is None else self.total.add_(part)

    def add_product(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if self.total is None or self.wide is not a.dtype:
            self.add(a @ b)
        else:
            self.total.addmm_(a, b)


def _linear(head: nn.Linear, hidden: torch.Tensor, sliced: Sliced) -> torch.Tensor:
    """A head that is a matrix, with or without bias. Its only weight-sized allocation is the gradient."""
    weight, bias = head.weight, head.bias
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(narrow), weight.to(narrow)
        bias = None if bias is None else bias.to(narrow)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    rows, extras = hidden.detach().flatten(0, -2), sliced.trained
    matrix, offset = weight.detach(), None if bias is None else bias.detach()
    scale, wanted = SCALE.get(rows.dtype, 1.0), [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    by_rows = torch.empty_like(rows) if wanted[0] else None
    by_matrix, by_bias, by_extras = _Sum(weight), _Sum(bias if bias is not None else weight), [*map(_Sum, extras)]
    labels, total = sliced.targets.flatten(), None
    with torch.autocast(kind, enabled=False), torch.no_grad():
        for part in slices(len(rows), sliced.entries):
            logits = F.linear(rows[part], matrix, offset)
            loss, given = _differentiated(logits, labels[part], sliced, extras, scale, wanted=any(wanted))
            del logits
            total = loss if total is None else total + loss
            if not given:
                continue
            if by_rows is not None:
                torch.mm(given[0], matrix, out=by_rows[part])
            if wanted[1]:
                by_matrix.add_product(given[0].t(), rows[part])
            if bias is not None and wanted[2]:
                by_bias.add(given[0].sum(0))
            for each, gradient in zip(by_extras, given[1:], strict=True):
                each.add(gradient)
            del given
    assert total is not None
    gradients = [None if by_rows is None else by_rows.view(hidden.shape), by_matrix.total, by_bias.total]
    known = [*zip(inputs, gradients, strict=False), *((each.like, each.total) for each in by_extras)]
    return _with_gradients(total, known, scale)


def _differentiated(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sliced: Sliced,
    extras: list[torch.Tensor],
    scale: float,
    *,
    wanted: bool,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The loss of a slice, and its gradients by the head's logits and by `extras`, times `scale`."""
    with torch.set_grad_enabled(wanted):
        leaf = logits.detach().requires_grad_(wanted)
        loss = sliced.of(leaf[None], labels[None])
    given = torch.autograd.grad(loss, [leaf, *extras], loss.new_full((), scale)) if wanted else ()
    return loss.detach(), given


def _any(head: nn.Module, inner: Callable[..., torch.Tensor], hidden: torch.Tensor, sliced: Sliced) -> torch.Tensor:
    """Any other head: autograd through its own forward, slice by slice."""
    rows, labels = hidden.detach().flatten(0, -2), sliced.targets.flatten()
    others = [p for p in (*head.parameters(), *sliced.trained) if p.requires_grad]
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or bool(others))
    scale, total = SCALE.get(rows.dtype, 1.0), None
    by_rows = torch.zeros_like(rows) if wanted and hidden.requires_grad else None
    sums = [_Sum(each) for each in others]
    for part in slices(len(rows), sliced.entries):
        with torch.set_grad_enabled(wanted):
            leaf = rows[part].detach().requires_grad_(wanted)
            loss = sliced.of(inner(leaf[None]), labels[part][None])
        total = loss.detach() if total is None else total + loss.detach()
        if wanted:
            given = torch.autograd.grad(loss, [leaf, *others], loss.new_full((), scale), allow_unused=True)
            if by_rows is not None and given[0] is not None:
                by_rows[part] = given[0]
            for each, gradient in zip(sums, given[1:], strict=True):
                each.add(gradient)
    assert total is not None
    known = [(hidden, None if by_rows is None else by_rows.view(hidden.shape)), *((s.like, s.total) for s in sums)]
    return _with_gradients(total, known, scale)


def _with_gradients(
    total: torch.Tensor, known: Sequence[tuple[torch.Tensor, torch.Tensor | None]], scale: float
) -> torch.Tensor:
    """`total`, with these gradients. Each has its own node: schedules that compute weight gradients later find them
    separately."""
    for tensor, gradient in known:
        if gradient is not None:
            total = total + _Known.apply(tensor, gradient, total.dtype, scale)
    return total


class _Known(torch.autograd.Function):
    """Zero with a known gradient."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype, scale: float
    ) -> torch.Tensor:
        ctx.gradient, ctx.dtype, ctx.scale = gradient, tensor.dtype, scale
        return torch.zeros((), dtype=dtype, device=tensor.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(gradients[0] / ctx.scale).to(ctx.dtype), None, None, None
