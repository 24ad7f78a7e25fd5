"""Optimizers on sharded parameters give the same parameters and states as one process, under every sharding.

Codes are equal bit for bit. Planted bugs are detected, and the collectives of an update are counted.
"""

from __future__ import annotations

import functools
from itertools import product

import pytest

from tests.support.harness import run_ranks
from tests.support.muon_cases import LAYOUTS
from tests.support.selection import rows
from tests.support.sharded_cases import PAGED, cuts_and_bugs

OPTIMIZERS = {
    "adamw_8bit": ["optimizer=adamw_8bit", "optimizer.lr=0.01"],
    "paged": ["optimizer=adamw_8bit", "optimizer.lr=0.01", "optimizer.groups.embedding.name=sgd", PAGED],
    "adafactor": ["optimizer=adafactor", "optimizer.lr=0.02", "optimizer.weight_decay=0.1"],
    "lion": ["optimizer=lion"],
    "schedule_free": ["optimizer=schedule_free"],
    "nadam": ["optimizer=custom", "optimizer.target=torch.optim.NAdam", "optimizer.weight_decay=0.1"],
    "by role": [
        *("optimizer=adafactor", "optimizer.lr=0.02", "optimizer.groups.experts.name=adamw_8bit"),
        *("optimizer.groups.embedding.name=lion", "optimizer.groups.vector.name=sgd"),
    ],
    "signs": ["optimizer=custom", "optimizer.target=tests.support.optimizers_of_users.Signs"],
}
BUGS = {"alone": ["adamw_8bit", "adafactor", "by role"], "one_axis": ["adafactor"]}
EIGHT_BITS = {"fsdp": 0, "hsdp": 0, "tensor": 1, "tensor_fsdp": 1, "tensor_data": 1}
COLLECTIVES = {
    **dict.fromkeys(("adamw_8bit", "paged"), EIGHT_BITS),
    "adafactor": {"fsdp": 3, "hsdp": 3, "tensor": 3, "tensor_fsdp": 6, "tensor_data": 3},
    "by role": {"fsdp": 3, "hsdp": 3, "tensor": 4, "tensor_fsdp": 7, "tensor_data": 4},
    **dict.fromkeys(("lion", "schedule_free", "nadam", "signs"), dict.fromkeys(LAYOUTS, 0)),
}

Found = list[tuple[dict[tuple[str, str], float], dict[tuple[str, str], float], dict[tuple[str, str], int]]]


# The other optimizers update each element by itself, as `signs` does. Replicas are whole copies of these shards.
OFTEN = ("adamw_8bit", "paged", "adafactor", "by role", "signs")
LAYOUTS_OFTEN = ("fsdp", "tensor", "tensor_fsdp")


@functools.cache
def ranks(often: bool) -> Found:
    if often:
        return run_ranks(4, cuts_and_bugs, {name: OPTIMIZERS[name] for name in OFTEN}, LAYOUTS_OFTEN, BUGS)
    return run_ranks(4, cuts_and_bugs, OPTIMIZERS, [*LAYOUTS], {})


@pytest.mark.parametrize(
    ("name", "often"),
    rows([*product(OFTEN, (True,)), *product(OPTIMIZERS, (False,))], lambda _, often: often),
    ids=lambda value: str(value),
)
def test_every_cut_is_one_process(name: str, often: bool) -> None:
    for sound, _, calls in ranks(often):
        layouts = {*(LAYOUTS_OFTEN if often else LAYOUTS)}
        assert {layout for one, layout in sound if one == name} == layouts
        assert max(far for (one, _), far in sound.items() if one == name) < 1e-11, sound
        found = {layout: count for (one, layout), count in calls.items() if one == name}
        assert found == {layout: COLLECTIVES[name][layout] for layout in layouts}


def test_bugs_show() -> None:
    for _, planted, _ in ranks(True):
        assert planted.keys() == {(bug, name) for bug, names in BUGS.items() for name in names}
        assert min(planted.values()) > 1e-3, planted
