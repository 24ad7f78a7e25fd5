"""`optimizer.paged` keeps states in host memory. Updates and checkpoints are unchanged; unsupported uses are refused.

Memory shared by a GPU and its host needs a GPU, so these tests replace it with CPU memory wherever the trainer
allocates it. tests/gpu tests the real memory. `test_sharded_states` tests sharded parameters, under the name `paged`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import EnvironmentProblem
from configs.load import load_config
from launch.estimate import main as memory_estimate
from tests.support.refusals import assert_refused
from tests.support.sharded_cases import PAGED, Pages, pages_on_cpu
from trainer.engine.torch_state import States
from trainer.model.roles import describe
from trainer.optim import managed
from trainer.optim.build import build_optimizer
from trainer.optim.table import ask, kept_bytes, paged_bytes

ROLES = "optimizer=adafactor optimizer.groups.embedding.name=adamw optimizer.groups.vector.name=lion"
PAGING = [
    *("optimizer=adamw", "optimizer=adamw optimizer.implementation=foreach", "optimizer=adamw_8bit"),
    *("optimizer=sgd", "optimizer=lion", "optimizer=adafactor", "optimizer=muon", "optimizer=adamw optimizer.ema=0.9"),
    ROLES,
]


@pytest.fixture
def pages() -> Iterator[Pages]:
    found = pages_on_cpu()
    yield found
    found.undo()


class Run:
    """A model and its optimizer. The weights and gradients are the same for all overrides."""

    def __init__(self, words: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 80), nn.LayerNorm(80))
        self.settings = load_config([*words.split(), "optimizer.lr=0.01"]).optimizer
        self.described = describe(self.model)
        self.optimizer = build_optimizer(self.model.named_parameters(), self.described, self.settings)
        self.states = States(self.optimizer, self.settings, self.described)

    def update(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(step)
            for parameter in self.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that a checkpoint holds."""
        named = dict(self.model.named_parameters())
        kept = {f"{kind}/{name}": t for name, p in named.items() for kind, t in self.states.of(name, p).items()}
        return {name: tensor.detach().clone() for name, tensor in {**named, **kept}.items()}

    def read(self, saved: dict[str, torch.Tensor], *, steps: int) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.detach().copy_(saved[name])
            for kind, tensor in self.states.make(name, parameter, steps=steps).items():
                tensor.copy_(saved[f"{kind}/{name}"])


@pytest.mark.parametrize("words", PAGING)
def test_the_same_bits_with_pages_and_without(words: str, pages: Pages) -> None:
    plain, with_pages = Run(words), Run(f"{words} {PAGED}")
    for run in (plain, with_pages):
        run.update(0, 3)
    torch.testing.assert_close(with_pages.tensors(), plain.tensors(), rtol=0, atol=0)
    about, settings = with_pages.described.values(), with_pages.settings
    assert sum(tensor.nbytes for tensor in pages.made) == paged_bytes(about, settings, "float32") > 0
    assert kept_bytes(about, settings, "float32") == kept_bytes(about, plain.settings, "float32")
    held = {tensor.data_ptr() for tensor in pages.made}
    for name, parameter in with_pages.model.named_parameters():
        state = with_pages.optimizer.state[parameter]
        for kind, kept in ask(settings).state(with_pages.described[name], settings, "float32").items():
            there = isinstance(state[kind], torch.Tensor) and state[kind].data_ptr() in held
            assert there is kept.paged, (name, kind)


@pytest.mark.parametrize("first", [PAGED, "optimizer.paged=false"])
def test_a_run_goes_on_with_pages_or_without(first: str, pages: Pages) -> None:
    second = PAGED if first != PAGED else "optimizer.paged=false"
    whole, begun, resumed = (
        Run("optimizer=adamw_8bit"),
        *(Run(f"optimizer=adamw_8bit {one}") for one in (first, second)),
    )
    whole.update(0, 5)
    begun.update(0, 3)
    made = len(pages.made)
    resumed.read(begun.tensors(), steps=3)
    resumed.update(3, 5)
    torch.testing.assert_close(resumed.tensors(), whole.tensors(), rtol=0, atol=0)
    assert (len(pages.made) > made) is (second == PAGED)


def test_without_a_gpus_library_it_says_so() -> None:
    with pytest.raises(EnvironmentProblem, match=r"optimizer\.paged=true: bitsandbytes has no library for a GPU"):
        managed.zeros((4, 4), torch.float32, torch.device("cuda", 0))


TINY = ["model=tiny", "model.config.vocab_size=4096", "data.seq_len=32", "cluster.kind=local", "cluster.device=cuda"]
TINY += ["cluster.gpu=h100", "estimate.format=json", "precision=fp32", "train.micro_batch_size=1"]


@pytest.mark.parametrize(
    ("words", "gpus"),
    [
        (["parallel=single"], 1),
        (["parallel=fsdp"], 2),
        (["parallel=pipeline"], 2),
        (["parallel=fsdp", "optimizer.in_backward=true"], 2),
        (["parallel=tensor", "optimizer=adamw_8bit"], 2),
    ],
)
def test_the_estimate_leaves_them_in_host_memory(
    words: list[str], gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def ranks(*more: str) -> list[dict[str, Any]]:
        assert memory_estimate([*TINY, *words, f"cluster.gpus_per_node={gpus}", *more]) == 0
        return json.loads(capsys.readouterr().out)["ranks"]

    for plain, paged in zip(ranks(), ranks(PAGED), strict=True):
        on_gpu = [rank["components"]["optimizer_bytes"] for rank in (plain, paged)]
        assert (plain["host_bytes"], paged["host_bytes"]) == (0, on_gpu[0] - on_gpu[1])
        assert plain["peak_allocated_bytes"] - paged["peak_allocated_bytes"] == paged["host_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["cluster.device=cpu"],
            "optimizer.paged=true: states move between a GPU and its host",
        ),
        (["parallel=zero2"], "optimizer.paged=true: DeepSpeed makes the states of its partitions itself"),
        (
            ["parallel=fsdp_offload"],
            "optimizer.paged=true: parallel.offload.parameters=cpu keeps states",
        ),
        (["optimizer=mezo"], "optimizer.paged=true: optimizer.name=mezo keeps no states"),
        (["optimizer=sgd", "optimizer.beta1=0"], "optimizer.paged=true: optimizer.name=sgd keeps no states"),
        (
            ["optimizer=schedule_free", "scheduler=constant"],
            "optimizer.paged=true: optimizer.name=schedule_free begins with states that are no zeros",
        ),
        (
            ["optimizer.groups.vector.name=schedule_free", "scheduler=constant"],
            "optimizer.paged=true: optimizer.groups.vector.name=schedule_free begins with states",
        ),
        (
            ["optimizer=custom", "optimizer.target=torch.optim.RMSprop"],
            "optimizer.paged=true: optimizer.name=custom begins with states",
        ),
    ],
)
def test_what_refuses_it(words: list[str], line: str) -> None:
    assert_refused(["cluster.device=cuda", "parallel=ddp", PAGED, *words], line)
