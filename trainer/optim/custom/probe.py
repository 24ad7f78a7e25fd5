"""Properties of an optimizer of any class, found by running it on small tensors.

coupled     a matrix updated whole, and its halves by optimizers of their own: are the results the same bits?
by_shape    the same matrix as a vector
forgotten   three updates, then two by a fresh optimizer that got what a checkpoint holds: as five in a row?
kept        the tensors of a parameter whose sides are primes, so that their shapes say what they follow
needed      the most that an update allocates, of one matrix and of two
draws       does an update, in float32 or bfloat16, draw from torch's default generator?
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from configs.by_path import find, misfits
from configs.choices import BYTES
from configs.errors import PlanError
from configs.schema import Optimizer as Settings
from trainer.optim.options import KEY
from trainer.optim.protocol import COUNTER

PRIMES, OTHERS = (67, 71, 73, 79), (83, 89, 97, 101)
SHAPE, STEPS, SAVED = (96, 256), 5, 3  # large enough to escape exemptions for small tensors
Cut = Callable[[torch.Tensor], torch.Tensor]
OWN = {"params": "", "lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay"}
"""Arguments that have their own keys, or come from the model."""


class Refused(PlanError):
    @property
    def lines(self) -> tuple[str, ...]:
        return self.problems


@dataclass(frozen=True, slots=True)
class Sides:
    """The shape of a state: for each side the parameter's sides whose product it is; a number; or, if it is neither, a
    fraction of the parameter's elements.

    host: it is in host memory, wherever the parameter is.
    """

    sides: tuple[tuple[int, ...] | int | float, ...]
    dtype: str
    host: bool

    def of(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(_length(side, shape) for side in self.sides)


def _length(side: tuple[int, ...] | int | float, shape: Sequence[int]) -> int:
    if isinstance(side, tuple):
        return prod(shape[dim] for dim in side)
    return side if isinstance(side, int) else ceil(side * prod(shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """coupled: how elements depend on each other; "" if they do not.
    by_shape: whether a vector of the same elements is updated differently.
    forgotten: states that a checkpoint would lose.
    others: states besides tensors of the parameter's shape and the count of updates.
    draws: whether an update draws random numbers."""

    coupled: str
    by_shape: bool
    forgotten: str
    others: str
    draws: bool


def examine(settings: Settings) -> Found:
    """Raises Refused, with one line for each problem."""
    return _examined(_key(settings))


def kept_of(settings: Settings, dims: int, dtype: str) -> dict[str, Sides]:
    return _kept(_key(settings), dims, dtype)


def needed_of(settings: Settings, dtype: str) -> tuple[float, float]:
    """Bytes that an update needs: per byte of the largest matrix, and per byte of all."""
    return _needed(_key(settings), dtype)


def construct(settings: Settings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """groups: with their own lr and weight_decay."""
    return _construct(_key(settings), groups)


def _key(settings: Settings) -> str:
    """Everything that determines the optimizer's behaviour, as a cache key."""
    return json.dumps([settings.target, settings.options, settings.lr, settings.weight_decay], default=str)


@cache
def _class(key: str) -> type[torch.optim.Optimizer]:
    path, options, _, decay = json.loads(key)
    given = f"optimizer.target={path}"
    try:
        found = find(path, given)
    except PlanError as error:
        raise Refused(*error.problems) from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise Refused(f"{given}: is no subclass of torch.optim.Optimizer; give one")
    problems = list(_misfits(found, path, options, decay))
    if problems:
        raise Refused(*problems)
    return found


def _misfits(found: type, path: str, options: dict[str, Any], decay: float) -> Iterator[str]:
    """Arguments that its constructor does not accept."""
    yield from misfits(found, path, options, key=KEY, own=OWN)
    takes = inspect.signature(found).parameters
    if decay and "weight_decay" not in takes and not any(about.kind is about.VAR_KEYWORD for about in takes.values()):
        yield f"optimizer.weight_decay={decay}: {path} has none; set it to 0"


def _construct(key: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    found, (path, options, lr, _) = _class(key), json.loads(key)
    takes = inspect.signature(found).parameters
    # torch's own choice on a GPU; the same on the CPU, so that a probe there predicts a GPU's needs.
    chosen = {"foreach": True} if "foreach" in takes and not {"foreach", "fused"} & options.keys() else {}
    rate = {"lr": lr} if "lr" in takes else {}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    try:
        return found(groups, **{**rate, **chosen, **options})
    except Exception as error:
        subject = f"{KEY}: {path} refuses them" if options else f"optimizer.target={path}: cannot be built"
        raise Refused(f"{subject} ({_line(error)})") from None


class _Trial:
    """An optimizer on parameters of some shapes, of which it has a part, updated by gradients that depend only on the
    parameter's number and the step."""

    def __init__(
        self, key: str, shapes: Sequence[tuple[int, ...]], cut: Cut = lambda tensor: tensor, dtype: str = "float32"
    ) -> None:
        self.path, _, self.lr, decay = json.loads(key)
        self.shapes, self.cut, self.dtype = shapes, cut, getattr(torch, dtype)
        self.parameters = [nn.Parameter(self._values(number, 0)) for number in range(len(shapes))]
        self.optimizer = _construct(key, [{"params": self.parameters, "lr": self.lr, "weight_decay": decay}])
        self.before = _numbers(self.optimizer)

    def run(self, begin: int, end: int) -> _Trial:
        for step in range(begin, end):
            for number, parameter in enumerate(self.parameters):
                parameter.grad = self._values(number, step + 1)
            self.step(step)
        return self

    def step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 - 0.1 * step)
        try:
            self.optimizer.step()
        except Exception as error:
            shapes = " and ".join(str(list(parameter.shape)) for parameter in self.parameters)
            raise Refused(
                f"optimizer.target={self.path}: its step failed on a parameter of shape {shapes} ({_line(error)}); use"
                " another optimizer"
            ) from None

    def continued(self, key: str) -> _Trial:
        """A fresh optimizer, loaded with a checkpoint of this one."""
        made = _Trial(key, self.shapes, self.cut)
        for mine, other in zip(self.parameters, made.parameters, strict=True):
            other.data.copy_(mine.data)
            state = self.optimizer.state[mine].items()
            held = {kind: value for kind, value in state if isinstance(value, torch.Tensor) or kind == COUNTER}
            made.optimizer.state[other] = {
                kind: value.clone() if isinstance(value, torch.Tensor) else value for kind, value in held.items()
            }
        return made

    def same(self, other: _Trial, cut: Cut) -> bool:
        """Whether the other's parameters are the corresponding parts of these."""
        pairs = zip(self.parameters, other.parameters, strict=True)
        return all(torch.equal(cut(mine.data), theirs.data) for mine, theirs in pairs)

    def changed(self) -> list[str]:
        """Its states besides tensors and the count of its updates."""
        after = _numbers(self.optimizer)
        states = {kind for state in self.optimizer.state.values() for kind in state if kind != COUNTER}
        tensors = {kind for state in self.optimizer.state.values() for kind, v in state.items() if torch.is_tensor(v)}
        return sorted({key for key, value in after.items() if value != self.before.get(key)} | states - tensors)

    def _values(self, number: int, step: int) -> torch.Tensor:
        """Values of very different magnitude, like gradients."""
        generator = torch.Generator().manual_seed(100 * number + step)
        values = torch.randn(self.shapes[number], generator=generator) * torch.logspace(-3, 0, self.shapes[number][-1])
        return self.cut(values).to(self.dtype, copy=True).contiguous()


@cache
def _examined(key: str) -> Found:
    shapes = [SHAPE, SHAPE[::-1]]
    whole = _Trial(key, shapes).run(0, STEPS)
    rows, columns = SHAPE[0] // 2, SHAPE[1] // 4
    kept = _kept(key, 2, "float32")
    cuts: dict[str, list[Cut]] = {
        "the rows of a matrix are updated together": [lambda t: t[:rows], lambda t: t[rows:]],
        "the columns of a matrix are updated together": [lambda t: t[:, :columns], lambda t: t[:, columns:]],
        "what ranks without a row hold is not updated": [lambda t: t[:0]],
    }
    coupled = next((why for why, both in cuts.items() if not all(_is_cut(whole, key, cut) for cut in both)), "")
    alone = _Trial(key, shapes[:1]).run(0, STEPS)
    if not coupled and not torch.equal(alone.parameters[0].data, whole.parameters[0].data):
        coupled = "parameters are updated together"
    resumed = _Trial(key, shapes).run(0, SAVED).continued(key).run(SAVED, STEPS)
    odd = [kind for kind, sides in kept.items() if any(isinstance(side, float) for side in sides.sides)]
    lost = [] if whole.same(resumed, lambda t: t) else whole.changed() or ["more than tensors"]
    forgotten = " and ".join([*odd, *lost])
    others = " and ".join(kind for kind, sides in kept.items() if kind != COUNTER and sides.sides != ((0,), (1,)))
    by_shape = not _is_cut(whole, key, torch.flatten)
    return Found(coupled=coupled, by_shape=by_shape, forgotten=forgotten, others=others, draws=_draws(key))


def _draws(key: str) -> bool:
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        _Trial(key, [SHAPE]).run(0, 2)
        with suppress(Refused):  # some draw to round to bfloat16, some do not take it
            _Trial(key, [SHAPE], dtype="bfloat16").run(0, 2)
        return not torch.equal(torch.get_rng_state(), before)


def _is_cut(whole: _Trial, key: str, cut: Cut) -> bool:
    return whole.same(_Trial(key, whole.shapes, cut).run(0, STEPS), cut)


@cache
def _kept(key: str, dims: int, dtype: str) -> dict[str, Sides]:
    path, options, *_ = json.loads(key)
    first, second = (_states(key, primes[:dims], dtype) for primes in (PRIMES, OTHERS))
    follow = {prod(sides): dims_ for dims_, sides in _products(PRIMES[:dims])}
    found: dict[str, Sides] = {}
    for kind, value in first.items():
        name = str(value.dtype).removeprefix("torch.")
        if name not in BYTES:
            raise Refused(f"optimizer.target={path}: keeps {kind} in {name}; use another optimizer")
        on_device = options.get("capturable") or options.get("fused")
        sides = tuple(follow.get(length, length) for length in value.shape)
        made = Sides(sides, name, host=not value.shape and not on_device)
        if made.of(OTHERS[:dims]) != tuple(second[kind].shape):
            made = Sides((value.numel() / prod(PRIMES[:dims]),), name, host=False)
        found[kind] = made
    return found


def _states(key: str, shape: tuple[int, ...], dtype: str) -> dict[str, torch.Tensor]:
    trial = _Trial(key, [shape], dtype=dtype).run(0, 2)
    state = dict(trial.optimizer.state[trial.parameters[0]])
    if COUNTER in state:
        state[COUNTER] = torch.zeros((), dtype=torch.float32)
    return {kind: value for kind, value in state.items() if isinstance(value, torch.Tensor)}


def _products(shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Consecutive sides, and their lengths."""
    for begin in range(len(shape)):
        for end in range(begin + 1, len(shape) + 1):
            yield tuple(range(begin, end)), tuple(shape[begin:end])


@cache
def _needed(key: str, dtype: str) -> tuple[float, float]:
    side, peaks = 128, []
    for count in (1, 2):
        trial = _Trial(key, [(side, side)] * count, dtype=dtype).run(0, 1)
        for number, parameter in enumerate(trial.parameters):
            parameter.grad = trial._values(number, 2)
        with _Peak() as peak:
            trial.step(1)
        peaks.append(peak.most / (side * side * trial.dtype.itemsize))
    together = round(max(0.0, peaks[1] - peaks[0]), 2)
    return max(0.0, round(peaks[0] - together, 2)), together


class _Peak(TorchDispatchMode):
    """Maximum bytes of tensors made inside that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.setdefault(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.live += size
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._died, size)
        return result

    def _died(self, size: int) -> None:
        self.live -= size


def _numbers(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Contents of its groups besides parameters and the learning rate."""
    groups = optimizer.param_groups
    return {key: str(group[key]) for group in groups for key in group if key not in ("params", "lr", "weight_decay")}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
