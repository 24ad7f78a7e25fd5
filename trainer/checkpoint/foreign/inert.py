"""Stand-ins, by name, for objects that programs store in their files together with the tensors.

A stand-in keeps its attributes and runs nothing, and the program itself is not imported.
"""

from __future__ import annotations

from typing import Any

from configs.imports.pickled import StandIn

DEEPSPEED = (
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    # What scripts hand to `save_checkpoint(client_state=...)`: arguments, paths, arrays, states of numpy's generators.
    "argparse.Namespace",
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


class _Inert(StandIn):
    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def stand_ins(names: tuple[str, ...]) -> list[Any]:
    """For `torch.serialization.safe_globals`."""
    return [(type(name.rpartition(".")[2], (_Inert,), {"kind": name}), name) for name in names]
