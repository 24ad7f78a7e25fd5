"""The CUDA allocator's environment variable: settings of the configuration are added, contradictions are refused."""

from __future__ import annotations

import pytest

from configs.errors import EnvironmentProblem
from trainer.process.segments import set_segments


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        ({}, True, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, False, {}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"},
            True,
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128,expandable_segments:True"},
        ),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True,"},
            True,
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True,"},
        ),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
            False,
            {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
        ),
    ],
)
def test_what_the_user_has_set_stays(before: dict[str, str], wanted: bool, after: dict[str, str]) -> None:
    environment = dict(before)
    set_segments(wanted, environment)
    assert environment == after


@pytest.mark.parametrize(("given", "wanted"), [("False", True), ("True", False)])
def test_the_opposite_is_refused_in_one_line(given: str, wanted: bool) -> None:
    with pytest.raises(EnvironmentProblem) as refused:
        set_segments(wanted, {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments: {given}"})
    (line,) = refused.value.problems
    assert line.startswith(f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments: {given}: contradicts cluster.")
    assert f"set cluster.expandable_segments={given.lower()}" in line
