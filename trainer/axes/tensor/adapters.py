"""Tensor parallel with adapters: each pair of thin matrices is divided along the same side as its layer.

    layer cut into columns      x ------+--> [ W: columns ] ----------------------> (+) --> y, a part
                                        |                                            ^
                                        +--> [ A: whole ] --> [ B: columns ] --------+

    layer cut into rows         x, -----+--> [ W: rows ] -- sum ------------------> (+) --> y
                                a part  |                                            ^
                                        +--> [ A: rows ] -- sum --> [ B: whole ] ----+

Columns: every rank computes the same A x, but each local B backpropagates only part of its gradient, so A's gradient is
summed once per step. Rows: one more sum forward, of `rank` features per token, and B works on the complete result;
under sequence parallel on this rank's tokens, and then its gradient is partial too. If a layer takes and returns
complete features (routers, latent projections), its adapter is undivided as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from trainer.axes.tensor.plans import match, split_style
from trainer.model.layers import is_linear
from trainer.model.peft import NAME, plain_name
from trainer.model.roles import INNER, innermost, stack_of

BESIDE: dict[str, tuple[str, ...]] = {
    "colwise": ("adapter_before_columns", "{style}"),
    "packed_colwise": ("adapter_before_columns", "{style}"),
    "rowwise": ("rowwise", "adapter_after_rows"),
    "replicated_with_grad_allreduce": ("{style}", "{style}"),
    "mla_kv_a_proj": (),
}
"""Style of a layer -> styles of its adapter's A and B. For all other styles both are undivided. None: some results of
the layer go to every head, which must apply to the sum of layer and adapter."""


def check_adapters(model: nn.Module, *, experts_apart: bool) -> Iterator[str]:
    """One line if a target is a parameter outside linear layers, such as stacked experts: peft adds the adapter's
    product to the whole parameter, of which a rank has only a part. experts_apart: another axis divides the experts."""
    for name, module in model.named_modules():
        base = getattr(module, INNER, None)
        if base is None or is_linear(base) or (experts_apart and stack_of(innermost(base))):
            continue
        yield (
            f"tuning.target_modules: {plain_name(name)} would get adapters and is no linear layer, and parallel.tp"
            " cuts none but those of linear layers; name linear layers ([q_proj, v_proj]), divide experts with"
            " parallel.ep, or set parallel.tp=1"
        )
        return


def beside_divided(model: nn.Module, apart: Iterable[str]) -> dict[str, str]:
    """Styles of the adapters of stacks that another axis has divided, by parameter. Each rank uses the rows of its own
    experts, on the tokens of all ranks that divide them. apart: names of what is divided, adapters around it too."""
    return {
        f"{name}.lora_{matrix}.{NAME}.weight": "replicated_with_grad_allreduce"
        for name in apart
        for matrix in "AB"
        if hasattr(model.get_submodule(name), f"lora_{matrix}")
    }


def styles_of(plan: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """{name: style} for those names of modules and parameters that the plan, written for the model without adapters,
    mentions. The style of a layer with an adapter applies to the layer's parts."""
    names = list(names)
    plain = match(plan, {plain_name(name) for name in names})
    styles = {name: style for name in names if (style := plain.get(plain_name(name)))}
    for layer in (name.removesuffix(f".{INNER}") for name in names if name.endswith(f".{INNER}")):
        style = styles.get(layer, "replicate")
        both = BESIDE.get(split_style(style)[0], ("replicate",) * 2)
        styles.pop(layer if both else f"{layer}.{INNER}", None)
        for matrix, beside in zip("AB", both, strict=False):
            prefix = f"{layer}.lora_{matrix}."
            modules = {
                name.rpartition(".")[0] for name in names if name.startswith(prefix) and name.endswith(".weight")
            }
            styles |= dict.fromkeys(modules, beside.format(style=style))
    return styles
