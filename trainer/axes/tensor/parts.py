"""A layer in isolation, and its closed parts that tensor parallel can divide; see `derive`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from trainer.axes.tensor.plans import share_of
from trainer.model.layers import is_linear, is_transposed
from trainer.model.roles import wildcard

TOLERANCE = 1e-5
"""Relative, in float64: some architectures compute parts in float32."""
ATTEMPTS, FEW = 120, 20
"""Maximum number of ways to divide one part of a layer. It is small if more than three other parameters lie in the
part, as in a recurrence, which runs token by token and mixes its inputs."""
EDGE = "the layer's own input and output"
Styles = dict[str, str]


@dataclass(slots=True)
class _Seen:
    """One run of a layer: the inputs of each linear layer, call by call, and the layer's result."""

    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    returned: list[torch.Tensor] = field(default_factory=list)


class Layer:
    """A layer in isolation. linears: the linear layers that it calls, by name inside it."""

    def __init__(
        self, layer: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, returns_more: bool
    ) -> None:
        """returns_more: whether the model uses the layer's results besides the hidden states."""
        self.layer, self.name, self.returns_more = layer, name, returns_more
        self.args, self.kwargs = args, kwargs
        self.linears = {n: m for n, m in layer.named_modules() if n and is_linear(m)}
        self.plain = _Seen()
        self.plain = self.run({name: None for name in self.linears})
        self.linears = {name: m for name, m in self.linears.items() if name in self.plain.inputs}

    def full(self, name: str) -> str:
        """Its name in a plan: `*` for the number of the layer and of equal parts, not for a position in a sequence."""
        path, module = [wildcard(self.name)], self.layer
        for word in name.split(".") if name else ():
            path.append(word if isinstance(module, nn.Sequential) else wildcard(word))
            module = getattr(module, word, module)
        return ".".join(path)

    @torch.no_grad()
    def run(self, own: Mapping[str, Any], *, disturbed: str = "", moved: bool = False) -> _Seen:
        """own: linear layers that compute; the others repeat their earlier results, the `disturbed` one with noise.
        moved: adds noise to the layer's input."""
        seen = _Seen()

        def call(name: str, inner: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
            number = len(seen.inputs.setdefault(name, []))
            seen.inputs[name].append(x.detach().clone())
            if name in own:
                y = inner(x)
            else:
                y = self.plain.outputs[name][number].clone()
                y = y + torch.randn_like(y) if name == disturbed else y
            seen.outputs.setdefault(name, []).append(y.detach().clone())
            replacing = own.get(name)
            return replacing(number, y) if replacing else y

        def given(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value + torch.randn_like(value) if moved and value.requires_grad else value.detach().clone()

        args, kwargs = tree_map(given, (self.args, self.kwargs))
        with ExitStack() as stack:
            for name, module in self.linears.items():
                inner = module.forward
                stack.enter_context(
                    _set(vars(module), "forward", lambda x, name=name, inner=inner: call(name, inner, x))
                )
            result = self.layer(*args, **kwargs)
        seen.returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        seen.returned = seen.returned if self.returns_more else seen.returned[:1]
        return seen

    def changed(self, seen: _Seen) -> set[str]:
        """The linear layers whose input changed, and EDGE if the layer's result changed."""
        names = {n for n in self.linears if not _same(seen.inputs.get(n, []), self.plain.inputs[n])}
        return names | (set() if _same(seen.returned, self.plain.returned) else {EDGE})

    def reached(self, **how: Any) -> set[str]:
        try:
            return self.changed(self.run({}, **how))
        except Exception:  # the layer's own code, for example a router that chooses other experts
            return {EDGE}

    def parameters(self) -> Iterator[tuple[str, nn.Module, str]]:
        """All parameters outside linear layers: name, owner, name in the owner."""
        for name, module in self.layer.named_modules():
            if name not in self.linears:
                yield from ((f"{name}.{leaf}" if name else leaf, module, leaf) for leaf in module._parameters)

    def closed_parts(self) -> Iterator[Part]:
        """Parts between linear layers that no other value with a gradient enters or leaves."""
        reach = {name: self.reached(disturbed=name) for name in self.linears}
        reach[EDGE] = self.reached(moved=True) | {EDGE}
        for name, module, leaf in self.parameters():
            if (value := module._parameters[leaf]) is not None and value.is_floating_point():
                with _set(module._parameters, leaf, nn.Parameter(value + torch.randn_like(value), False)):
                    reach[name] = self.reached()
        groups: list[tuple[set[str], set[str]]] = []
        for source, sinks in reach.items():
            if not sinks:
                continue
            joined = [group for group in groups if group[1] & sinks]
            groups = [group for group in groups if group not in joined]
            groups.append(({source}.union(*(g[0] for g in joined)), sinks.union(*(g[1] for g in joined))))
        for sources, sinks in groups:
            linears = [name for name in self.linears if name in sources]
            if EDGE not in sources | sinks and linears and not sinks & sources:
                between = [name for name in reach if name in sources and name not in linears]
                yield Part(self, linears, [name for name in self.linears if name in sinks], between)

    def weight_is_read(self, name: str) -> bool:
        """Whether the code uses the weight besides calling the linear layer."""
        module = self.linears[name]
        weight = module._parameters["weight"]
        assert weight is not None
        with _set(module._parameters, "weight", nn.Parameter(weight + torch.randn_like(weight), False)):
            return bool(self.reached())


@dataclass(frozen=True, slots=True)
class Part:
    """columns, rows: linear layers at its beginning and end. between: other parameters."""

    layer: Layer
    columns: list[str]
    rows: list[str]
    between: list[str]

    @property
    def linears(self) -> set[str]:
        return {self.layer.full(name) for name in (*self.columns, *self.rows)}

    def cut(self, tp: int) -> Styles | None:
        """Styles under which the ranks' parts add up to the whole, or None."""
        packings = itertools.product(("colwise", "packed_colwise:3", "packed_colwise:2"), repeat=len(self.columns))
        between = itertools.product(("replicated_with_grad_allreduce", "channels"), repeat=len(self.between))
        tried = itertools.product(packings, between, self._attributes(tp))
        ways = sorted(itertools.islice(tried, 20 * ATTEMPTS), key=_effort)
        for packing, between, attributes in ways[: ATTEMPTS if len(self.between) <= 3 else FEW]:
            styles = dict(zip(self.columns, packing, strict=True)) | dict.fromkeys(self.rows, "rowwise")
            styles |= dict(zip(self.between, between, strict=True))
            if self._adds_up(styles, attributes, tp):
                return self._named(styles, attributes)
        return None

    def _attributes(self, tp: int) -> list[tuple[tuple[str, str], ...]]:
        """Sets of attributes to divide: those of one module with equal values belong together."""
        modules = dict(self.layer.layer.named_modules())
        owners = {name.rpartition(".")[0] for name in (*self.columns, *self.rows, *self.between)}
        owners |= {name.rpartition(".")[0] for name in owners}
        groups: dict[tuple[str, int, bool], list[str]] = {}
        for owner in sorted(owners):
            for name, value in vars(modules[owner]).items():
                if type(value) is int and value > 1 and value % tp == 0 and not name.startswith("_"):
                    groups.setdefault((owner, value, "head" in name and "dim" not in name), []).append(name)
        keys = list(groups)
        chosen = [c for size in range(min(4, len(keys) + 1)) for c in itertools.combinations(keys, size)]
        return [
            tuple((owner, name) for key in keys for owner, name in ((key[0], n) for n in groups[key]))
            for keys in chosen
        ]

    def _adds_up(self, styles: Styles, attributes: Sequence[tuple[str, str]], tp: int) -> bool:
        modules = dict(self.layer.layer.named_modules())
        totals: dict[str, list[torch.Tensor]] = {}
        plain = self.layer.plain

        def row(name: str) -> Callable[[int, torch.Tensor], torch.Tensor]:
            def add(number: int, y: torch.Tensor) -> torch.Tensor:
                sums = totals.setdefault(name, [])
                if len(sums) == number:
                    sums.append(y)
                else:
                    sums[number] = sums[number] + y
                return plain.outputs[name][number].clone()

            return add

        try:
            for rank in range(tp):
                counted = {name: len(sums) for name, sums in totals.items()}
                with ExitStack() as stack:
                    for name, style in styles.items():
                        for table, leaf, value in self._local(modules, name, style, rank, tp):
                            stack.enter_context(_set(table, leaf, value))
                    for owner, name in attributes:
                        stack.enter_context(_set(vars(modules[owner]), name, getattr(modules[owner], name) // tp))
                    own = {name: None for name in self.columns} | {name: row(name) for name in self.rows}
                    self.layer.run(own)
                if counted and counted != {name: len(sums) for name, sums in totals.items()}:
                    return False
        except Exception:  # the layer's own code, on sizes that do not fit it
            return False
        return all(
            _close(total if (bias := modules[name]._parameters["bias"]) is None else total + bias, whole)
            for name in self.rows
            for total, whole in zip(totals[name], plain.outputs[name], strict=True)
        )

    def _local(
        self, modules: Mapping[str, nn.Module], name: str, style: str, rank: int, tp: int
    ) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Replacements of parameters on one rank: (table, key, value)."""
        if name in self.layer.linears:
            module, leaves = modules[name], ("weight", "bias")
        else:
            owner, _, leaf = name.rpartition(".")
            module, leaves = modules[owner], (leaf,)
        for leaf in leaves:
            value = module._parameters[leaf]
            if value is None:
                continue
            if style == "rowwise" and leaf == "bias":
                yield module._parameters, leaf, torch.zeros_like(value) if is_transposed(module) else None
                continue
            share = share_of(style, leaf, value.ndim, transposed=is_transposed(module))
            if share.dim is not None:
                if value.shape[share.dim] % (tp * share.parts):
                    raise ValueError("does not divide")
                blocks = [block.chunk(tp, share.dim)[rank] for block in value.chunk(share.parts, share.dim)]
                local = torch.cat(blocks, share.dim) if len(blocks) > 1 else blocks[0]
                yield module._parameters, leaf, nn.Parameter(local, False)
        if is_transposed(module) and style != "rowwise":
            yield vars(module), "nf", -1

    def _named(self, styles: Styles, attributes: Sequence[tuple[str, str]]) -> Styles:
        divided: dict[str, list[str]] = {}
        for owner, name in attributes:
            divided.setdefault(self.layer.full(owner), []).append(name)
        named = {self.layer.full(name): style for name, style in styles.items()}
        return {owner: f"divide:{','.join(names)}" for owner, names in divided.items()} | named


def _effort(way: tuple[Iterable[Any], ...]) -> int:
    """How unusual a way to divide is; the first one that adds up is taken."""
    return sum(choice not in ("colwise", "replicated_with_grad_allreduce") for choices in way for choice in choices)


def _same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def _close(value: torch.Tensor, wanted: torch.Tensor) -> bool:
    return value.shape == wanted.shape and bool((value - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


@contextmanager
def _set(table: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """A dictionary with another value for one key, inside the context."""
    missing = object()
    before = table.get(key, missing)
    table[key] = value
    try:
        yield
    finally:
        if before is missing:
            del table[key]
        else:
            table[key] = before
