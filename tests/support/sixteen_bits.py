"""Matmuls in 16 bits on a CPU that has no instructions for them: computed in float32 and rounded once.

torch's own kernels do the same in a plain loop, which takes ten times as long on such a CPU. `replace_matmuls`
replaces them in this process and in its forks; autograd and what watches operators see the matmuls as before.
"""

from __future__ import annotations

import warnings

import torch

WITHOUT = ("DEFAULT", "AVX2")
"""Capabilities, as torch names them, of CPUs without 16-bit instructions."""
WIDE = {torch.bfloat16, torch.float16}
_library = torch.library.Library("aten", "IMPL")


def replace_matmuls() -> None:
    """Replace the matmuls of two matrices, and of batches of them, where the CPU gains from it."""
    if torch.backends.cpu.get_cpu_capability() not in WITHOUT:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is replaced
        _library.impl("mm", _mm, "CPU")
        _library.impl("bmm", _bmm, "CPU")


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype in WIDE:
        return _mm(left.float(), right.float()).to(left.dtype)
    # The form that writes into a given tensor is an operator of its own, and was not replaced.
    return torch.mm(left, right, out=left.new_empty((left.shape[0], right.shape[1])))


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype in WIDE:
        return _bmm(left.float(), right.float()).to(left.dtype)
    return torch.bmm(left, right, out=left.new_empty((left.shape[0], left.shape[1], right.shape[2])))
