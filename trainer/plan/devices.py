"""Known GPUs: memory, peak speed and bandwidth, from the makers' data sheets.

A run reads its peak here to state its MFU; an estimate reads memory, a planner reads bandwidth. Torch-free.

Peak FLOP/s are dense: data sheets since Ampere print twice as much, for matrices in which two of four numbers are
zero. They are the peaks of the unit that runs a matmul (tensor core, matrix core) with float32 accumulation, as in
training. A missing entry (None) means that the GPU has no such unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from configs.choices import DType

GIB = 2**30
GB_PER_SECOND = 1e9
TERA = 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """name: value of `cluster.gpu`. torch_name: pattern for `torch.cuda.get_device_name()`, matched in full.

    memory_bytes: bytes that CUDA can allocate (`total_memory` of the device's properties in torch). The driver keeps
    some hundred MiB of `nvidia-smi`'s total, and the card its error-correcting code; the amount depends on the driver,
    and this is the lowest reported value. memory_bandwidth: bytes/s. link_bandwidth: bytes/s to the other GPUs of its
    node over `link`, the sum of both directions, as in data sheets; one direction has half of it.
    """

    name: str
    torch_name: str
    memory_bytes: int
    float32_flops: float
    tf32_flops: float | None
    bfloat16_flops: float | None
    float16_flops: float
    float8_flops: float | None
    memory_bandwidth: float
    link: str
    link_bandwidth: float

    def peak_flops(self, dtype: DType, *, tf32: bool = False, float8: float = 0.0) -> float | None:
        """Dense FLOP/s of matmuls with `dtype` inputs; None if the table has none (float64 always).

        float8: share of the FLOPs in float8. The result is then the peak of both parts, executed one after the other.
        """
        peaks = {
            DType.float32: self.tf32_flops if tf32 else self.float32_flops,
            DType.bfloat16: self.bfloat16_flops,
            DType.float16: self.float16_flops,
        }
        rest = peaks.get(dtype)
        if rest is None or not float8 or self.float8_flops is None:
            return rest
        return 1 / (float8 / self.float8_flops + (1 - float8) / rest)


def _gpu(
    name: str,
    torch_name: str,
    gib: float,
    tflops: tuple[float, float | None, float | None, float, float | None],
    gb_per_second: float,
    link: tuple[str, float],
) -> Gpu:
    """A row of the table. gib: memory that CUDA can allocate. tflops: float32, tf32, bfloat16, float16, float8.
    Bandwidths in 1e9 bytes/s."""
    float32, tf32, bfloat16, float16, float8 = tflops
    return Gpu(
        name=name,
        torch_name=torch_name,
        memory_bytes=int(gib * GIB),
        float32_flops=float32 * TERA,
        tf32_flops=None if tf32 is None else tf32 * TERA,
        bfloat16_flops=None if bfloat16 is None else bfloat16 * TERA,
        float16_flops=float16 * TERA,
        float8_flops=None if float8 is None else float8 * TERA,
        memory_bandwidth=gb_per_second * GB_PER_SECOND,
        link=link[0],
        link_bandwidth=link[1] * GB_PER_SECOND,
    )


NVLINK_2, NVLINK_3 = ("NVLink 2", 300.0), ("NVLink 3", 600.0)
NVLINK_4, NVLINK_5 = ("NVLink 4", 900.0), ("NVLink 5", 1800.0)
NVLINK_CUT = ("NVLink, cut for export", 400.0)
NVLINK_BRIDGE = ("NVLink bridge to one neighbour", 600.0)
SMALL_BRIDGE = ("NVLink bridge to one neighbour", 112.5)
PCIE_3, PCIE_4, PCIE_5 = ("PCIe 3.0 x16", 32.0), ("PCIe 4.0 x16", 64.0), ("PCIe 5.0 x16", 128.0)

# tflops: float32, tf32, bfloat16, float16, float8, dense
_A100 = (19.5, 156.0, 312.0, 312.0, None)  # "NVIDIA A100 Tensor Core GPU" data sheet, 2021
_H100_SXM = (67.0, 494.7, 989.4, 989.4, 1978.9)  # "NVIDIA H100 Tensor Core GPU" data sheet: 989 / 1,979 with sparsity
_H100_NVL = (60.0, 417.5, 835.5, 835.5, 1671.0)  # the same, column NVL: 835 / 1,671 with sparsity
_MI300X = (163.4, 653.7, 1307.4, 1307.4, 2614.9)  # "AMD Instinct MI300X" data sheet, 2023; dense

GPUS: tuple[Gpu, ...] = (
    # Memory: the capacity that torch reports when it runs out, as quoted in public reports; read in November 2026.
    # A100 data sheet: both forms, both sizes; 80 GB has faster memory.
    _gpu("A100-SXM-40GB", r"(NVIDIA )?A100-SXM4-40GB", 39.38, _A100, 1555, NVLINK_3),
    _gpu("A100-SXM-80GB", r"(NVIDIA )?A100-SXM4-80GB", 79.14, _A100, 2039, NVLINK_3),
    _gpu("A100-PCIe-40GB", r"(NVIDIA )?A100-PCIE-40GB", 39.38, _A100, 1555, NVLINK_BRIDGE),
    _gpu("A100-PCIe-80GB", r"(NVIDIA )?A100 80GB PCIe", 79.14, _A100, 1935, NVLINK_BRIDGE),
    # "NVIDIA A800" data sheet, 2022: an A100 with eight NVLinks of twelve.
    _gpu("A800-SXM-80GB", r"(NVIDIA )?A800-SXM4-80GB", 79.14, _A100, 2039, NVLINK_CUT),
    # H100 data sheet: the PCIe card has fewer units, lower clocks and HBM2e; NVL is a PCIe card with 94 GB of HBM3.
    _gpu("H100-SXM", r"NVIDIA H100 80GB HBM3", 79.1, _H100_SXM, 3350, NVLINK_4),
    _gpu("H100-PCIe", r"NVIDIA H100 PCIe", 79.1, (51.0, 378.0, 756.0, 756.0, 1513.0), 2000, NVLINK_BRIDGE),
    _gpu("H100-NVL", r"NVIDIA H100 NVL", 93.0, _H100_NVL, 3900, NVLINK_BRIDGE),
    # "NVIDIA H800" and "NVIDIA H20" data sheets, 2023: the H100 with fewer links; with fewer units and more memory.
    _gpu("H800-SXM", r"NVIDIA H800", 79.1, _H100_SXM, 3350, NVLINK_CUT),
    _gpu("H20", r"NVIDIA H20", 95.0, (44.0, 74.0, 148.0, 148.0, 296.0), 4000, NVLINK_4),
    # "NVIDIA H200 Tensor Core GPU" data sheet: the H100's units, more and faster memory (141 GB).
    _gpu("H200", r"NVIDIA H200", 139.72, _H100_SXM, 4800, NVLINK_4),
    _gpu("H200-NVL", r"NVIDIA H200 NVL", 139.72, _H100_NVL, 4800, ("NVLink bridge to up to three", 900.0)),
    # "NVIDIA GH200 Grace Hopper Superchip" data sheet, 2023: 96 GB of HBM3.
    _gpu("GH200", r"NVIDIA GH200 (480|120)GB", 94.5, _H100_SXM, 4000, NVLINK_4),
    # "NVIDIA DGX B200" data sheet, divided by its eight GPUs: 36 PFLOP/s bf16 and 18 TF32 with sparsity, 64 TB/s.
    _gpu("B200", r"NVIDIA B200", 178.35, (75.0, 1125.0, 2250.0, 2250.0, 4500.0), 8000, NVLINK_5),
    # "NVIDIA DGX B300" data sheet, 2025, likewise: 36 and 18 PFLOP/s with sparsity, 64 TB/s.
    _gpu("B300", r"NVIDIA B300 SXM6 AC", 267.69, (75.0, 1125.0, 2250.0, 2250.0, 4500.0), 8000, NVLINK_5),
    # "NVIDIA GB200 NVL72" and "GB300 NVL72" data sheets, divided by 72: 360 and 180 PFLOP/s with sparsity, 576 TB/s.
    _gpu("GB200", r"NVIDIA GB200", 184.31, (80.0, 1250.0, 2500.0, 2500.0, 5000.0), 8000, NVLINK_5),
    _gpu("GB300", r"NVIDIA GB300", 276.5, (80.0, 1250.0, 2500.0, 2500.0, 5000.0), 8000, NVLINK_5),
    # "NVIDIA L40S" data sheet: 183 / 362.05 / 362.05 dense, 48 GB GDDR6 with ECC.
    _gpu("L40S", r"NVIDIA L40S", 44.39, (91.6, 183.0, 362.05, 362.05, 733.0), 864, PCIE_4),
    # "NVIDIA L4" data sheet: 120 / 242 / 242 with sparsity, 24 GB GDDR6 with ECC.
    _gpu("L4", r"NVIDIA L4", 22.03, (30.3, 60.0, 121.0, 121.0, 242.5), 300, PCIE_4),
    # "NVIDIA A10" data sheet: 62.5 / 125 / 125 dense, 24 GB GDDR6 with ECC.
    _gpu("A10", r"NVIDIA A10", 21.95, (31.2, 62.5, 125.0, 125.0, None), 600, PCIE_4),
    # "NVIDIA A10G" data sheet: another, slower card: 35 / 70 / 70 dense.
    _gpu("A10G", r"NVIDIA A10G", 21.95, (31.5, 35.0, 70.0, 70.0, None), 600, PCIE_4),
    # "NVIDIA A40" data sheet, 2021: 74.8 / 149.7 / 149.7 dense, 48 GB GDDR6 with ECC.
    _gpu("A40", r"(NVIDIA )?A40", 44.34, (37.4, 74.8, 149.7, 149.7, None), 696, SMALL_BRIDGE),
    # "NVIDIA T4" data sheet, 2018: tensor cores for float16 alone; 16 GB GDDR6 with ECC.
    _gpu("T4", r"Tesla T4", 14.56, (8.1, None, None, 65.0, None), 320, PCIE_3),
    # "NVIDIA V100" data sheet, 2020: tensor cores for float16 alone.
    _gpu("V100-SXM-16GB", r"Tesla V100-SXM2-16GB", 15.77, (15.7, None, None, 125.0, None), 900, NVLINK_2),
    _gpu("V100-SXM-32GB", r"Tesla V100-SXM[23]-32GB", 31.73, (15.7, None, None, 125.0, None), 900, NVLINK_2),
    _gpu("V100-PCIe-16GB", r"Tesla V100-PCIE-16GB", 15.77, (14.0, None, None, 112.0, None), 900, PCIE_3),
    _gpu("V100-PCIe-32GB", r"Tesla V100-PCIE-32GB", 31.73, (14.0, None, None, 112.0, None), 900, PCIE_3),
    # "NVIDIA RTX Blackwell GPU Architecture" and its PRO edition, 2025: tables of the GB202 cards.
    _gpu("RTX-5090", r"NVIDIA GeForce RTX 5090", 31.34, (104.8, 104.8, 209.5, 209.5, 419.0), 1792, PCIE_5),
    _gpu(
        "RTX-PRO-6000",
        r"NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        94.96,
        (126.0, 251.9, 503.8, 503.8, 1007.6),
        1792,
        PCIE_5,
    ),
    # "NVIDIA Ada GPU Architecture" white papers, tables of the AD102 cards.
    _gpu("RTX-4090", r"NVIDIA GeForce RTX 4090", 23.52, (82.6, 82.6, 165.2, 165.2, 330.3), 1008, PCIE_4),
    _gpu("RTX-6000-Ada", r"NVIDIA RTX 6000 Ada Generation", 47.4, (91.1, 182.1, 364.2, 364.2, 728.5), 960, PCIE_4),
    # "NVIDIA Ampere GA102 GPU Architecture" white paper; two cards may share an NVLink bridge of 112.5 GB/s.
    _gpu("RTX-3090", r"(NVIDIA )?GeForce RTX 3090", 23.56, (35.6, 35.6, 71.0, 71.0, None), 936, PCIE_4),
    _gpu("RTX-A6000", r"(NVIDIA )?RTX A6000", 47.4, (38.7, 77.4, 154.8, 154.8, None), 768, SMALL_BRIDGE),
    # "AMD Instinct" data sheets. MI300X and MI325X: seven links of 128 GB/s; MI350X and MI355X (2025) of 153.6, and no
    # unit for TF32. A virtual function (VF) of the MI300X has 0.3 GiB less.
    _gpu("MI300X", r"AMD Instinct MI300X( VF| OAM)?", 191.69, _MI300X, 5300, ("Infinity Fabric", 896)),
    _gpu("MI325X", r"AMD Instinct MI325X( VF| OAM)?", 255.69, _MI300X, 6000, ("Infinity Fabric", 896)),
    _gpu(
        "MI350X",
        r"AMD Instinct MI350X",
        287.98,
        (144.2, None, 2306.9, 2306.9, 4613.7),
        8000,
        ("Infinity Fabric 4", 1075.2),
    ),
    _gpu(
        "MI355X",
        r"AMD Instinct MI355X",
        287.98,
        (157.3, None, 2516.6, 2516.6, 5033.2),
        8000,
        ("Infinity Fabric 4", 1075.2),
    ),
)


# Spellings of parts of these names, in addition to the parts of `Gpu.name` itself.
_ALIASES = {
    "H100-SXM": "80gb hbm3",
    "H100-PCIe": "80gb",
    "H100-NVL": "94gb pcie",
    "H800-SXM": "80gb",
    "H20": "96gb sxm",
    "H200": "sxm 141gb",
    "H200-NVL": "141gb pcie",
    "GH200": "96gb",
    "B200": "sxm 180gb 192gb",
    "B300": "sxm 288gb",
    "L40S": "48gb",
    "L4": "24gb",
    "A10": "24gb",
    "A10G": "24gb",
    "A40": "48gb",
    "T4": "tesla 16gb",
    "RTX-5090": "geforce 32gb",
    "RTX-PRO-6000": "blackwell 96gb",
    "RTX-4090": "geforce 24gb",
    "RTX-6000-Ada": "48gb",
    "RTX-3090": "geforce 24gb",
    "RTX-A6000": "48gb",
    "MI300X": "192gb oam",
    "MI325X": "256gb oam",
    "MI350X": "288gb oam",
    "MI355X": "288gb oam",
}


def find_gpu(name: str) -> Gpu | None:
    """The GPU with this name in torch, in this table or in common usage: h100, a100_80gb, "RTX 4090". None for an
    unlisted GPU, and for a name that several sizes share."""
    for gpu in GPUS:
        if gpu.name.lower() == name.lower() or re.fullmatch(gpu.torch_name, name):
            return gpu
    meant = _meant(name)
    return meant[0] if len(meant) == 1 else None


def _meant(name: str) -> list[Gpu]:
    """Every GPU whose name contains all parts, including the model; of one size the SXM form precedes PCIe."""
    parts = _parts(name)
    found = [gpu for gpu in GPUS if parts and parts <= _known_parts(gpu) and _model(gpu) <= parts]
    return [gpu for gpu in found if "sxm" in _known_parts(gpu)] or found


def _known_parts(gpu: Gpu) -> set[str]:
    return _parts(f"{gpu.name} {_ALIASES.get(gpu.name, '')}")


def _model(gpu: Gpu) -> set[str]:
    """The parts without which a name means another card: for RTX cards, all."""
    parts = gpu.name.lower().split("-")
    return set(parts[1:]) if parts[0] == "rtx" else {parts[0]}


def _parts(name: str) -> set[str]:
    """Normalised parts of a name: sxm4 is sxm, 80g is 80gb, rtx4090 is rtx 4090."""
    text = re.sub(r"sxm\d", "sxm", re.sub(r"rtx(?=\d)", "rtx ", name.lower()))
    text = re.sub(r"(\d+) ?gi?b?(?![a-z0-9])", r"\1gb", text)
    return set(re.findall(r"[a-z0-9]+", text))


def check_gpu(name: str | None) -> Iterator[str]:
    """A problem of `cluster.gpu`, in one line."""
    if name is None or find_gpu(name) is not None:
        return
    meant = _meant(name)
    if meant:
        yield f"cluster.gpu={name}: there are several; choose {' or '.join(gpu.name for gpu in meant)}"
    else:
        yield f"cluster.gpu={name}: not in the table of known GPUs; use {', '.join(gpu.name for gpu in GPUS)}, or null"
