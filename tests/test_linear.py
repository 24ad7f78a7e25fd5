"""Each kind of linear layer is one module. No pass changes the type of a layer, and no consumer names a kind."""

from __future__ import annotations

import re

import pytest

from tests.support.harness import run_ranks
from tests.support.linear_cases import train_doubled
from tests.support.parity import words
from tests.support.shared import once
from tests.test_imports import MODULES

STEPS = 2
ONE_PROCESS = 1e-10


@once
def alone(model: str, doubled: bool) -> tuple[list[float], list[str], set[str]]:
    return run_ranks(1, train_doubled, words(model, "single", "fp64", STEPS), doubled)[0]


@pytest.mark.parametrize(("layout", "model"), [("fsdp", "llama"), ("tensor", "llama"), ("tensor", "gpt2")])
def test_a_replaced_layer_computes_everywhere_with_the_type_of_its_weight(layout: str, model: str) -> None:
    losses, called, at_rest = alone(model, True)
    plain, *_ = alone(model, False)
    assert abs(losses[0] / plain[0] - 1) > 1e-5
    expected = {"llama": "o_proj", "gpt2": "c_proj"}[model]
    assert any(expected in name for name in called) and all(name.endswith(" Typed") for name in called)
    assert at_rest == {"Typed"}
    for found, called_there, at_rest_there in run_ranks(2, train_doubled, words(model, layout, "fp64", STEPS), True):
        assert max(abs(a / b - 1) for a, b in zip(found, losses, strict=True)) <= ONE_PROCESS
        assert called_there == called
        assert at_rest_there == {"Typed"}


def test_kinds_are_named_in_their_room_alone() -> None:
    """Other modules query `trainer.linear`. Messages and config files may name the choices of a user."""
    method = "[\"']q?lora[\"']"
    asked = re.compile(rf"TuningMethod|Linear4bit|four_bit|[!=]= *{method}|{method} *[!=]=|in [\[({{]{method}")
    outside = {
        name: file
        for name, file in MODULES.items()
        if not name.startswith(("trainer.linear", "trainer.inputs", "configs."))
    }
    assert len(outside) > 100
    assert [name for name, file in outside.items() if asked.search(file.read_text())] == []
    assert asked.search(MODULES["trainer.linear.adapter"].read_text())
