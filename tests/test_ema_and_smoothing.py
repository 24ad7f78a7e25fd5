"""`optimizer.ema` and `train.label_smoothing`: their values, their storage, and their refusals.

`test_parity.test_smoothed_labels_noise_and_averaged_weights_equal_single_process` tests them under every layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED
from configs.load import load_config
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from tests.support.refusals import assert_refused
from trainer.axes.tensor.vocabulary import chunked_cross_entropy_sum
from trainer.checkpoint.__main__ import main as checkpoint_main
from trainer.data import IGNORED
from trainer.model.loss import cross_entropy_sum, in_training
from trainer.model.roles import describe
from trainer.optim.build import build_optimizer
from trainer.optim.placed import averaged
from trainer.optim.table import ask, kept_bytes, saved_state

STEADY = ["optimizer=adamw", "optimizer=sgd", "optimizer=muon", "optimizer=adamw_8bit", "optimizer=adafactor"]


@pytest.mark.parametrize("name", [*STEADY, "optimizer=lion"])
def test_the_average_is_torchs_own(name: str) -> None:
    torch.manual_seed(0)
    settings = load_config([name, "optimizer.ema=0.7", "optimizer.lr=0.01"]).optimizer
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    described = describe(model)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    expected.update_parameters(model)  # its first call copies
    optimizer = build_optimizer(model.named_parameters(), described, settings)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        expected.update_parameters(model)
    optimizer.zero_grad()
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    with averaged(optimizer, ask(settings).average(settings)):
        torch.testing.assert_close([*model.parameters()], [*expected.module.parameters()])
    torch.testing.assert_close([*model.parameters()], trained, rtol=0, atol=0)
    for key, parameter in model.named_parameters():
        state, table = optimizer.state[parameter], saved_state(described[key], settings, "float32")
        assert {kind: tuple(state[kind].shape) for kind in table} == {kind: kept.shape for kind, kept in table.items()}
    plain = load_config([name]).optimizer
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert kept_bytes(described.values(), settings, "float32") == kept_bytes(described.values(), plain, "float32") + (
        4 * numel
    )


def test_smoothed_training_and_plain_validation() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, :2] = IGNORED
    target = torch.zeros(2, 5, 11, dtype=torch.float64).scatter_(-1, labels.clamp(min=0)[..., None], 0.75) + 0.25 / 11
    each = -(target * logits.log_softmax(-1)).sum(-1)
    (wanted,) = torch.autograd.grad(expected := each[labels != IGNORED].sum(), logits)
    for plain in (cross_entropy_sum, chunked_cross_entropy_sum):
        loss = in_training(plain, 0.25)
        found = loss(logits, labels)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits)[0], wanted)
        with torch.no_grad():
            torch.testing.assert_close(loss(logits, labels), plain(logits, labels))
    assert in_training(cross_entropy_sum, 0.0) is cross_entropy_sum


TINY = ["model=tiny", "model.config.num_hidden_layers=1", "data=synthetic", "data.seq_len=16", "cluster.device=cpu"]
TINY += [
    "train.global_batch_size=4",
    "train.eval_samples=2",
    "precision=fp64",
    "scheduler=constant",
    "optimizer.ema=0.8",
]


def go_on(folder: str, layout: str, steps: int, *more: str) -> int:
    return run_trainer([*TINY, f"parallel={layout}", f"train.steps={steps}", f"train.run_dir={folder}/run", *more])


def finish(folder: str) -> list[int]:
    """Resumes from another layout's checkpoint, trains without a break, exports, and makes a start that is refused.

    The refused start changes no file of the finished run.
    """
    return [
        go_on(folder, "single", 4),
        go_on(f"{folder}/alone", "single", 4),
        checkpoint_main(["export", f"{folder}/run", f"{folder}/out"]),
        go_on(folder, "single", 6, "optimizer.ema=0"),
    ]


def test_the_average_goes_on_under_another_layout_and_is_exported(tmp_path: Path) -> None:
    assert run_ranks(2, go_on, str(tmp_path), "fsdp", 2) == [EXIT_FINISHED] * 2
    assert run_ranks(1, finish, str(tmp_path)) == [[EXIT_FINISHED] * 3 + [EXIT_BAD_CONFIG]]
    places = [tmp_path / "run/model", tmp_path / "alone/run/model", tmp_path / "out"]
    again, alone, out = (load_file(place / "model.safetensors") for place in places)
    saved = load_file(next((tmp_path / "alone/run/checkpoints").glob("step-*4/rank-*.safetensors")))
    for name, value in alone.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(out[name], again[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(value, saved[f"ema/{name}"].to(value.dtype))
        assert not torch.equal(saved[f"ema/{name}"], saved[f"model/{name}"]), name
    losses = [
        json.loads((tmp_path / run / "summary.json").read_text())["validation_loss_last"]
        for run in ("run", "alone/run")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optimizer.ema=0.9", "parallel=zero2"], "optimizer.ema=0.9: validates an average of the weights"),
        (
            ["optimizer.ema=0.9", "optimizer=schedule_free", "scheduler=constant"],
            "optimizer.ema=0.9: optimizer.name=schedule_free averages the weights itself",
        ),
        (
            ["optimizer.ema=0.9", "optimizer.groups.vector.name=schedule_free", "scheduler=constant"],
            "optimizer.ema=0.9: optimizer.groups.vector.name=schedule_free averages the weights itself",
        ),
        (["optimizer.ema=0.9", "optimizer=mezo"], "optimizer.ema=0.9: mezo keeps no states"),
        (["train.label_smoothing=0.1", "optimizer=mezo"], "train.label_smoothing=0.1: mezo follows the loss of"),
        (["train.neftune_alpha=5", "optimizer=mezo"], "train.neftune_alpha=5.0: mezo follows the loss of"),
    ],
)
def test_what_refuses_them(words: list[str], line: str) -> None:
    assert_refused(words, line)


NOISY = [word.replace("layers=1", "layers=2") for word in TINY if "ema" not in word]
NOISY += ["train.neftune_alpha=5", "train.steps=3", "train.export=false", "checkpoint.every=0"]


def disturbed(folder: str, *more: str) -> int:
    return run_trainer([*NOISY, f"train.run_dir={folder}", *more])


def disturbed_each(folder: str) -> list[int]:
    still = disturbed(f"{folder}/still", "parallel=single", "train.neftune_alpha=0")
    return [still, disturbed(f"{folder}/single", "parallel=single")]


def test_noise_is_in_training_alone_and_the_same_under_every_layout(tmp_path: Path) -> None:
    assert run_ranks(1, disturbed_each, str(tmp_path)) == [[EXIT_FINISHED] * 2]
    for layout in ("ddp", "context"):
        words = [f"parallel={layout}"]
        assert run_ranks(2, disturbed, str(tmp_path / layout), *words) == [EXIT_FINISHED] * 2
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("still", "single", "ddp", "context")
    }
    before = {name: found[0]["validation_loss"] for name, found in lines.items()}
    assert all(value == pytest.approx(before["still"], rel=1e-12) for value in before.values())
    losses = {name: [line["loss"] for line in found if line["kind"] == "step"] for name, found in lines.items()}
    for layout in ("ddp", "context"):
        assert losses[layout] == pytest.approx(losses["single"], rel=1e-10)
    assert losses["single"] != pytest.approx(losses["still"], rel=1e-7)
