"""The table of known GPUs is searched by torch's names and never answers with a similar GPU."""

from __future__ import annotations

import re

import pytest

from configs.choices import DType
from trainer.plan.devices import _ALIASES, GPUS, check_gpu, find_gpu

GIB = 2**30


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("Tesla V100-SXM2-16GB", "V100-SXM-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-SXM-32GB"),
        ("Tesla V100-SXM3-32GB", "V100-SXM-32GB"),
        ("Tesla V100-PCIE-16GB", "V100-PCIe-16GB"),
        ("Tesla V100-PCIE-32GB", "V100-PCIe-32GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X VF", "MI300X"),
        ("h100-sxm", "H100-SXM"),
        # Names as people write them.
        ("h100", "H100-SXM"),
        ("H100_SXM5 80GB", "H100-SXM"),
        ("h100-pcie", "H100-PCIe"),
        ("h100 94gb", "H100-NVL"),
        ("h200 141gb", "H200"),
        ("a10g", "A10G"),
        ("gh200", "GH200"),
        ("a6000", "RTX-A6000"),
        ("rtx 6000 ada", "RTX-6000-Ada"),
        ("5090", "RTX-5090"),
        ("a100-80gb", "A100-SXM-80GB"),
        ("A100 40G", "A100-SXM-40GB"),
        ("V100-32GB", "V100-SXM-32GB"),
        ("H200-SXM", "H200"),
        ("rtx4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("mi300x", "MI300X"),
    ],
)
def test_finds_a_gpu_by_either_name(torch_name: str, name: str) -> None:
    gpu = find_gpu(torch_name)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM-64GB",
        "NVIDIA L40",
        "NVIDIA GH200 144G HBM3e",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "Quadro RTX 6000",
        "rtx 6000",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "A100",
        "80gb",
        "sxm",
        "",
    ],
)
def test_does_not_take_a_relative_for_it(name: str) -> None:
    assert find_gpu(name) is None


def test_peaks_are_dense_and_memory_is_what_cuda_can_allocate() -> None:
    h200 = find_gpu("NVIDIA H200")
    assert h200 is not None
    assert h200.peak_flops(DType.bfloat16) == 989.4e12  # with sparsity it would be 1,979
    assert h200.peak_flops(DType.float32) == 67e12
    assert h200.peak_flops(DType.float32, tf32=True) == 494.7e12
    assert h200.peak_flops(DType.float64) is None
    v100 = find_gpu("Tesla V100-SXM2-16GB")
    assert v100 is not None
    assert v100.peak_flops(DType.bfloat16) is None
    assert v100.peak_flops(DType.float32, tf32=True) is None
    for gpu in GPUS:
        # Memory is the advertised size (in GiB except for HBM3e cards) minus error correction and the driver's share.
        size = re.search(r"(\d+)gb", f"{gpu.name} {_ALIASES.get(gpu.name, '')}".lower())
        if size:
            assert 0.9 * int(size[1]) < gpu.memory_bytes / GIB < int(size[1]), gpu.name


def test_names_are_distinct_and_each_torch_name_has_one_row() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(set(GPUS)) == len(GPUS) == 37


def test_an_unknown_gpu_is_one_line_that_lists_the_known_ones() -> None:
    assert list(check_gpu(None)) == []
    assert list(check_gpu("b200")) == []
    (problem,) = check_gpu("a100")
    assert problem == "cluster.gpu=a100: there are several; choose A100-SXM-40GB or A100-SXM-80GB"
    (problem,) = check_gpu("H9000")
    assert problem.startswith("cluster.gpu=H9000: not in the table of known GPUs; use A100-SXM-40GB, ")
    assert "MI300X" in problem
    assert "\n" not in problem
