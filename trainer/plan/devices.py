"""Known GPUs: memory, peak speed and bandwidth, from the makers' data sheets.

A run reads its peak here to state its MFU; an estimate reads memory, a planner reads bandwidth. Torch-free.

Peak FLOP/s are dense: data sheets since Ampere print twice as much, for matrices in which two of four numbers are
zero. They are those of the unit that a matrix product runs on (tensor core, matrix core) with float32 accumulation,
as training uses it. A missing entry (None) means that the GPU has no such unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from configs.choices import DType

MIB = 2**20
GB_PER_SECOND = 1e9
TERA = 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """name: what `cluster.gpu` takes. torch_name: pattern of `torch.cuda.get_device_name()`, matched whole.

    memory_bytes: the total that the driver reports (`nvidia-smi`, `rocm-smi`), below the advertised size where the
    card keeps its error-correcting code in the same memory. memory_bandwidth: bytes/s. link_bandwidth: bytes/s to the
    other GPUs of its node over `link`, both directions added up, as data sheets count; one direction has half of it.
    """

    name: str
    torch_name: str
    memory_bytes: int
    float32_flops: float
    tf32_flops: float | None
    bfloat16_flops: float | None
    float16_flops: float
    memory_bandwidth: float
    link: str
    link_bandwidth: float

    def peak_flops(self, dtype: DType, *, tf32: bool = False) -> float | None:
        """Dense FLOP/s of matrix products on `dtype` inputs; None where the table has none (float64 always)."""
        peaks = {
            DType.float32: self.tf32_flops if tf32 else self.float32_flops,
            DType.bfloat16: self.bfloat16_flops,
            DType.float16: self.float16_flops,
        }
        return peaks.get(dtype)


def _gpu(
    name: str,
    torch_name: str,
    mib: int,
    tflops: tuple[float, float | None, float | None, float],
    gb_per_second: float,
    link: tuple[str, float],
) -> Gpu:
    """A row of the table. tflops: float32, tf32, bfloat16, float16. Bandwidths in 1e9 bytes/s."""
    float32, tf32, bfloat16, float16 = tflops
    return Gpu(
        name=name,
        torch_name=torch_name,
        memory_bytes=mib * MIB,
        float32_flops=float32 * TERA,
        tf32_flops=None if tf32 is None else tf32 * TERA,
        bfloat16_flops=None if bfloat16 is None else bfloat16 * TERA,
        float16_flops=float16 * TERA,
        memory_bandwidth=gb_per_second * GB_PER_SECOND,
        link=link[0],
        link_bandwidth=link[1] * GB_PER_SECOND,
    )


NVLINK_2, NVLINK_3 = ("NVLink 2", 300.0), ("NVLink 3", 600.0)
NVLINK_4, NVLINK_5 = ("NVLink 4", 900.0), ("NVLink 5", 1800.0)
NVLINK_BRIDGE = ("NVLink bridge to one neighbour", 600.0)
PCIE_3, PCIE_4 = ("PCIe 3.0 x16", 32.0), ("PCIe 4.0 x16", 64.0)

# tflops: float32, tf32, bfloat16, float16, dense
_A100 = (19.5, 156.0, 312.0, 312.0)  # "NVIDIA A100 Tensor Core GPU" data sheet, 2021
_H100_SXM = (67.0, 494.7, 989.4, 989.4)  # "NVIDIA H100 Tensor Core GPU" data sheet: 989 / 1,979 with sparsity

GPUS: tuple[Gpu, ...] = (
    # A100 data sheet: both forms, both sizes; 80 GB has faster memory.
    _gpu("A100-SXM-40GB", r"(NVIDIA )?A100-SXM4-40GB", 40960, _A100, 1555, NVLINK_3),
    _gpu("A100-SXM-80GB", r"(NVIDIA )?A100-SXM4-80GB", 81920, _A100, 2039, NVLINK_3),
    _gpu("A100-PCIe-40GB", r"(NVIDIA )?A100-PCIE-40GB", 40960, _A100, 1555, NVLINK_BRIDGE),
    _gpu("A100-PCIe-80GB", r"(NVIDIA )?A100 80GB PCIe", 81920, _A100, 1935, NVLINK_BRIDGE),
    # H100 data sheet: the PCIe card has fewer units, lower clocks and HBM2e.
    _gpu("H100-SXM", r"NVIDIA H100 80GB HBM3", 81559, _H100_SXM, 3350, NVLINK_4),
    _gpu("H100-PCIe", r"NVIDIA H100 PCIe", 81559, (51.0, 378.0, 756.0, 756.0), 2000, NVLINK_BRIDGE),
    # "NVIDIA H200 Tensor Core GPU" data sheet: the H100's units, more and faster memory (141 GB).
    _gpu("H200", r"NVIDIA H200", 143771, _H100_SXM, 4800, NVLINK_4),
    # "NVIDIA DGX B200" data sheet, divided by its eight GPUs: 36 PFLOP/s bf16 and 18 TF32 with sparsity, 64 TB/s.
    _gpu("B200", r"NVIDIA B200", 183359, (75.0, 1125.0, 2250.0, 2250.0), 8000, NVLINK_5),
    # "NVIDIA L40S" data sheet: 183 / 362.05 / 362.05 dense, 48 GB GDDR6 with ECC.
    _gpu("L40S", r"NVIDIA L40S", 46068, (91.6, 183.0, 362.05, 362.05), 864, PCIE_4),
    # "NVIDIA L4" data sheet: 120 / 242 / 242 with sparsity, 24 GB GDDR6 with ECC.
    _gpu("L4", r"NVIDIA L4", 23034, (30.3, 60.0, 121.0, 121.0), 300, PCIE_4),
    # "NVIDIA A10" data sheet: 62.5 / 125 / 125 dense, 24 GB GDDR6 with ECC. The A10G is another, slower card.
    _gpu("A10", r"NVIDIA A10", 23028, (31.2, 62.5, 125.0, 125.0), 600, PCIE_4),
    # "NVIDIA V100" data sheet, 2020: tensor cores for float16 alone.
    _gpu("V100-SXM-16GB", r"Tesla V100-SXM2-16GB", 16384, (15.7, None, None, 125.0), 900, NVLINK_2),
    _gpu("V100-SXM-32GB", r"Tesla V100-SXM[23]-32GB", 32768, (15.7, None, None, 125.0), 900, NVLINK_2),
    _gpu("V100-PCIe-16GB", r"Tesla V100-PCIE-16GB", 16384, (14.0, None, None, 112.0), 900, PCIE_3),
    _gpu("V100-PCIe-32GB", r"Tesla V100-PCIE-32GB", 32768, (14.0, None, None, 112.0), 900, PCIE_3),
    # "NVIDIA Ada GPU Architecture" white paper, table of the AD102 cards.
    _gpu("RTX-4090", r"NVIDIA GeForce RTX 4090", 24564, (82.6, 82.6, 165.2, 165.2), 1008, PCIE_4),
    # "NVIDIA Ampere GA102 GPU Architecture" white paper; two cards may share an NVLink bridge of 112.5 GB/s.
    _gpu("RTX-3090", r"(NVIDIA )?GeForce RTX 3090", 24576, (35.6, 35.6, 71.0, 71.0), 936, PCIE_4),
    # "AMD Instinct MI300X" data sheet: 163.4 / 653.7 / 1307.4 / 1307.4 dense, seven links of 128 GB/s.
    _gpu(
        "MI300X",
        r"AMD Instinct MI300X( VF| OAM)?",
        196288,
        (163.4, 653.7, 1307.4, 1307.4),
        5300,
        ("Infinity Fabric", 896),
    ),
)


# How people write parts of these names, in addition to the parts of `Gpu.name` itself.
_ALIASES = {
    "H100-SXM": "80gb hbm3",
    "H100-PCIe": "80gb",
    "H200": "sxm 141gb",
    "B200": "sxm 180gb 192gb",
    "L40S": "48gb",
    "L4": "24gb",
    "A10": "24gb",
    "RTX-4090": "geforce 24gb",
    "RTX-3090": "geforce 24gb",
    "MI300X": "192gb oam",
}


def find_gpu(name: str) -> Gpu | None:
    """The GPU that torch calls `name`, or that this table does, or that people do: h100, a100_80gb, "RTX 4090". None
    for one that is not listed, and for a name that several sizes share."""
    for gpu in GPUS:
        if gpu.name.lower() == name.lower() or re.fullmatch(gpu.torch_name, name):
            return gpu
    meant = _meant(name)
    return meant[0] if len(meant) == 1 else None


def _meant(name: str) -> list[Gpu]:
    """Every GPU that has all parts of a name, the model's among them; of one size the SXM form goes before PCIe."""
    parts = _parts(name)
    found = [gpu for gpu in GPUS if parts and parts <= _parts(f"{gpu.name} {_ALIASES.get(gpu.name, '')}")]
    found = [gpu for gpu in found if _model(gpu) in parts]
    return [gpu for gpu in found if "SXM" in gpu.name] or found


def _model(gpu: Gpu) -> str:
    return gpu.name.lower().removeprefix("rtx-").partition("-")[0]


def _parts(name: str) -> set[str]:
    """Words of a name: sxm4 is sxm, 80g is 80gb, rtx4090 is rtx 4090."""
    text = re.sub(r"sxm\d", "sxm", re.sub(r"rtx(?=\d)", "rtx ", name.lower()))
    text = re.sub(r"(\d+) ?gi?b?(?![a-z0-9])", r"\1gb", text)
    return set(re.findall(r"[a-z0-9]+", text))


def check_gpu(name: str | None) -> Iterator[str]:
    """What is wrong with `cluster.gpu`, in one line."""
    if name is None or find_gpu(name) is not None:
        return
    meant = _meant(name)
    if meant:
        yield f"cluster.gpu={name}: there are several; choose {' or '.join(gpu.name for gpu in meant)}"
    else:
        yield f"cluster.gpu={name}: not in the table of known GPUs; use {', '.join(gpu.name for gpu in GPUS)}, or null"
