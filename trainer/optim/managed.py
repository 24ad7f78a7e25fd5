"""Memory that a GPU and its host share: CUDA's managed memory, allocated by bitsandbytes, as tensors of the GPU.

    torch.zeros(..., device="cuda")    lies on the GPU; where there is no room, the run ends
    managed.zeros(...)                 its pages lie on the GPU while there is room; otherwise the driver moves those
                                       that were used longest ago to host memory, and back when a kernel reads them

torch's allocator does not know these bytes, and takes room from them when it asks the driver for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

from configs.errors import EnvironmentProblem

if TYPE_CHECKING:
    import torch

KEY = "optimizer.paged=true"


def check() -> None:
    """Raises EnvironmentProblem if bitsandbytes cannot allocate it."""
    if find_spec("bitsandbytes") is None:
        raise EnvironmentProblem(f"{KEY}: needs bitsandbytes; pip install 'distributed-training-cookbook[tuning]'")
    from bitsandbytes.cextension import lib

    if not lib.compiled_with_cuda:
        raise EnvironmentProblem(
            f"{KEY}: bitsandbytes has no library for a GPU loaded here; python -m bitsandbytes says why"
        )


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Raises EnvironmentProblem as `check` does."""
    check()
    import torch
    from bitsandbytes.functional import get_paged

    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    # bitsandbytes returns it as a CPU tensor, which only its own kernels would accept.
    seen = _Shared(get_paged(size, dtype=torch.uint8, device=device))
    return torch.as_tensor(seen, device=device).view(dtype).view(tuple(shape)).zero_()


class _Shared:
    """The interface from which torch reads an address, a size and a dtype."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }
        self.memory = memory
