"""A compiled layer in a trace: the two graphs that torch.compile gives to its code generator, run one by one.

    a layer's forward -> AOTAutograd -> forward and backward in one graph -> the partitioner's minimum cut -> two graphs

A compiled layer keeps for its backward the values that the first graph hands to the second: no float32 copy of a norm's
input, and no result that is cheaper to compute again than to read. These are known without code generation. The
operators that one kernel then joins, whose results in between are never written, are unknown. They count here, for the
one layer that is being computed, so that a compiled run needs a little less than its trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from trainer.model.build import held_layers
from trainer.recompute import recomputed


def imitate_compile(model: nn.Module) -> None:
    """Make every decoder layer of this unit run as `trainer.compile` would have it, in place."""
    for layer in held_layers(model):
        layer.forward = _Partitioned(layer)


class _Partitioned:
    """The forward of a layer. Its graphs are made at the first call, for the shapes of that call."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.eager, self.options = recomputed(layer.forward)
        self.program: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        own = {**dict(self.layer.named_parameters()), **dict(self.layer.named_buffers())}
        if self.program is None:

            def plain(own: dict[str, torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
                given = iter(tensors)
                filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in constants]
                args, kwargs = tree_unflatten(filled, spec)
                with _reparametrize_module(self.layer, own):
                    return self.eager(*args, **kwargs)

            def tagged(own: dict[str, torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
                """As torch.compile traces a recompute: what the policy says of an operation is noted in the graph."""
                with preserve_node_meta():
                    return checkpoint(plain, own, tensors, preserve_rng_state=False, early_stop=False, **self.options)

            constants = [leaf if not isinstance(leaf, torch.Tensor) else torch.empty(0) for leaf in leaves]
            self.program = _partitioned(tagged if self.options else plain)
            # The graphs are made by running the layer once. Neither the tracker nor a recompute that counts saved
            # tensors may see that run.
            with _disable_current_modes(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                self.program(own, tensors)
        return self.program(own, tensors)


def _partitioned(function: Callable[..., Any]) -> Callable[..., Any]:
    # Both imports take seconds; a trace of eager layers avoids them.
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    compiler: Any = _run_one_by_one
    return aot_function(
        function,
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


def _run_one_by_one(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Run a graph and release each value after its last use, as the code that inductor writes does."""
    interpreter = torch.fx.Interpreter(graph)

    def run(values: list[Any]) -> Any:
        try:
            return interpreter.boxed_run(values)
        finally:
            interpreter.env.clear()  # the results are still in it

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run
