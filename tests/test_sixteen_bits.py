"""The tests' own matmuls in 16 bits round once, as torch's do."""

from __future__ import annotations

import pytest
import torch

from tests.support.harness import run_ranks


def _largest_errors(dtype: torch.dtype) -> list[float]:
    """Of each matmul, relative to the largest entry of the exact one."""
    torch.manual_seed(0)
    left, right = torch.randn(3, 40, 64).to(dtype), torch.randn(3, 64, 24).to(dtype)
    found = [(left[0] @ right[0], left[0].double() @ right[0].double()), (left @ right, left.double() @ right.double())]
    return [float((made.double() - exact).abs().max() / exact.abs().max()) for made, exact in found]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmuls_are_rounded_once(dtype: torch.dtype) -> None:
    assert all(error <= torch.finfo(dtype).eps for error in run_ranks(1, _largest_errors, dtype)[0])
