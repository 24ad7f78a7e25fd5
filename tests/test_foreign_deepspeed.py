"""This trainer resumes from DeepSpeed's checkpoints, and DeepSpeed resumes from the checkpoints exported here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import CheckpointMismatch
from configs.load import load_config
from configs.schema import Precision
from tests.support.cases import run_trainer
from tests.support.deepspeed_sources import (
    LR,
    RUN,
    WINDOW,
    Source,
    Trained,
    go_on_with_deepspeed,
    to_universal,
    train_by_transformers,
    train_divided,
    train_with_deepspeed,
)
from tests.support.harness import run_ranks
from tests.support.selection import rows
from tests.support.spoilt_saves import SPOILT
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.foreign.table import open_foreign
from trainer.model.build import build_hf_config
from trainer.model.precision import LossScale

RANKS, FURTHER = 2, 2
SOURCES = {
    source.name: source
    for source in (
        Source(name="zero1", stage=1, groups=True),
        Source(name="zero2", stage=2, groups=True, tied=True),
        Source(name="zero3", stage=3, groups=True, sub_group=3000),
        # With bfloat16, stage 1 uses another optimizer and other file names.
        Source(name="zero1-bf16", stage=1, groups=True, precision="bf16", data_types=True),
        Source(name="zero3-frozen", stage=3, frozen=("model.embed_tokens",)),
    )
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Trained]:
    adapted = [
        Source(name=f"zero{stage}-adapters", stage=stage, adapters=str(folder / f"base{stage}")) for stage in (2, 3)
    ]
    sources = [*SOURCES.values(), *adapted]
    found = run_ranks(RANKS, train_with_deepspeed, [*RUN, "parallel=zero2"], str(folder), sources, FURTHER)
    return dict(zip([source.name for source in sources], found[0], strict=True))


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "zero3-frozen"])
def test_every_tensor_is_that_of_deepspeed(folder: Path, trained: dict[str, Trained], name: str) -> None:
    _, source = open_foreign(folder / name)
    expected = trained[name].state
    assert sorted(source.names()) == sorted(expected)
    for key, tensor in expected.items():
        assert source.shape(key) == tuple(tensor.shape)
        assert torch.equal(source.read(key), tensor), key
    record = source.record
    assert (record.step, record.optimizer_steps, record.samples, record.optimizer) == (3, 3, 12, "adamw")
    assert record.settings["optimizer.weight_decay"] == 0.1
    assert record.settings["train.global_batch_size"] == 4


@pytest.mark.parametrize(
    ("name", "layout", "ranks"), [("zero1", "single", 1), ("zero2", "single", 1), ("zero3", "fsdp", 2)]
)
def test_next_losses_are_those_of_deepspeed(
    folder: Path, trained: dict[str, Trained], tmp_path: Path, name: str, layout: str, ranks: int
) -> None:
    words = [f"parallel={layout}", "train.steps=5", f"train.run_dir={tmp_path}", f"train.resume={folder / name}"]
    words += [f"model.config.tie_word_embeddings={str(SOURCES[name].tied).lower()}"]
    # This DeepSpeed warmup starts at zero, unlike the schedules here. The test passes the lr of the next update.
    words += [f"optimizer.lr={open_foreign(folder / name)[1].record.next_lr}"]
    assert set(run_ranks(ranks, run_trainer, [*RUN, *words])) == {0}
    # The first loss depends on the weights; the second also depends on the moments, the step and the learning rate.
    assert _losses(tmp_path) == pytest.approx(trained[name].losses[3:], rel=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoint_of_transformers_trainer_with_deepspeed(tmp_path: Path, stage: int) -> None:
    """The checkpoint has the names, config and schedule of transformers' Trainer. The test uses one process because the
    Trainer does not split the batch on a CPU."""
    theirs = run_ranks(1, train_by_transformers, [*RUN, "parallel=single"], str(tmp_path / "out"), stage)[0]
    place, source = open_foreign(tmp_path / "out" / "checkpoint-3")
    assert sorted(source.names()) == sorted(theirs.state)
    assert all(torch.equal(source.read(key), tensor) for key, tensor in theirs.state.items())
    assert (source.record.samples, source.record.next_lr, source.record.settings["optimizer.lr"]) == (12, LR, LR)
    words = ["parallel=single", "train.steps=5", f"train.run_dir={tmp_path / 'run'}", f"train.resume={place}"]
    assert run_ranks(1, run_trainer, [*RUN, *words]) == [0]
    assert _losses(tmp_path / "run") == pytest.approx(theirs.losses[3:], rel=1e-6)


@pytest.mark.nightly
def test_three_ranks_float16_and_deepspeeds_own_converter(tmp_path: Path) -> None:
    """The ranks do not divide the rows evenly. The loss scale and the universal checkpoints of `ds_to_universal` are
    read too."""
    sources = [
        Source(name="zero1", stage=1),
        Source(name="zero2-half", stage=2, groups=True, precision="fp16"),
        Source(name="zero3", stage=3, groups=True, sub_group=3000),
        Source(name="zero3-half", stage=3, precision="fp16"),
        Source(name="zero2-offload", stage=2, groups=True, offload=True),
        Source(name="zero3-offload", stage=3, groups=True, offload=True),
    ]
    words = [*RUN, "parallel=zero2", "train.global_batch_size=6"]
    found = run_ranks(3, train_with_deepspeed, words, str(tmp_path), sources, 6)[0]
    for source, theirs in zip(sources, found, strict=True):
        run_ranks(
            1, to_universal, tmp_path / source.name / "global_step3", tmp_path / f"{source.name}-u" / "global_step3"
        )
        for folder in (tmp_path / source.name, tmp_path / f"{source.name}-u"):
            _, taken = open_foreign(folder)
            assert sorted(taken.names()) == sorted(theirs.state)
            assert all(torch.equal(taken.read(key), tensor) for key, tensor in theirs.state.items())
            record = taken.record
            assert (record.step, record.samples) == (3, 18)
            if theirs.scales:
                scale = LossScale(Precision(loss_scale_window=WINDOW))
                scale.restore(record.loss_scale, record.good_steps)
                grown = [scale.value for _ in range(6) if [scale.update(finite=True)]]
                assert [record.loss_scale, *grown[:-1]] == theirs.scales[3:]


@pytest.mark.nightly
def test_tensor_parallel_comes_through_the_universal_form(tmp_path: Path) -> None:
    sources = [Source(name=f"zero{stage}", stage=stage, tensor=2) for stage in (1, 3)]
    model = ["model.config.vocab_size=64", "model.config.intermediate_size=48", "model.config.mlp_bias=false"]
    found = run_ranks(2, train_divided, [*RUN, *model, "parallel=zero2"], str(tmp_path), sources)[0]
    for source, whole in zip(sources, found, strict=True):
        with pytest.raises(
            CheckpointMismatch, match="is of a model divided by tensor or pipeline parallel; convert it"
        ):
            open_foreign(tmp_path / source.name)
        run_ranks(
            1, to_universal, tmp_path / source.name / "global_step2", tmp_path / f"{source.name}-u" / "global_step2"
        )
        _, taken = open_foreign(tmp_path / f"{source.name}-u", build_hf_config(load_config([*RUN, *model]).model))
        assert whole is not None
        assert len(taken.names()) == 3 * len(whole)
        assert all(torch.equal(taken.read(f"model/{name}"), tensor) for name, tensor in whole.items())


@pytest.mark.nightly
def test_deepspeed_goes_on_from_a_run_that_began_here(tmp_path: Path) -> None:
    """DeepSpeed resumes with another engine and number of ranks. Its first update uses the run's learning rate."""
    words = [
        *RUN,
        "train.global_batch_size=6",
        "train.steps=5",
        "checkpoint.every=3",
        f"train.run_dir={tmp_path / 'run'}",
    ]
    assert run_ranks(1, run_trainer, [*words, "parallel=single"]) == [0]
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run/checkpoints/step-00000003"), str(out), "--format", "deepspeed"]) == 0
    goals = [Source(name="zero1", stage=1, groups=True, warmup=2), Source(name="zero3", stage=3, groups=True, warmup=2)]
    found = run_ranks(3, go_on_with_deepspeed, [*words, "parallel=zero2"], [str(out)] * 2, goals, FURTHER)[0]
    for went_on in found:
        assert went_on.losses == pytest.approx(_losses(tmp_path / "run")[3:], rel=1e-6)


def test_deepspeed_goes_on_bit_by_bit(folder: Path, trained: dict[str, Trained], tmp_path: Path) -> None:
    """The round trip DeepSpeed -> here -> DeepSpeed keeps weights, moments, warmup and the weight decay of each group.
    A run of another ZeRO stage resumes from it too."""
    for name in ("zero2", "zero3"):
        assert main(["import", str(folder / name), str(tmp_path / name)]) == 0
        assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}-out"), "--format", "deepspeed"]) == 0
    narrow = [str(tmp_path / "zero2"), str(tmp_path / "never"), "--format", "deepspeed", "--dtype", "bfloat16"]
    assert main(["export", *narrow]) == 2
    other = Source(name="zero1-other", stage=1, groups=True)
    goals = [("zero2", SOURCES["zero2"]), ("zero3", SOURCES["zero3"]), ("zero3", other)]
    outs = [str(tmp_path / f"{name}-out") for name, _ in goals]
    words = [*RUN, "parallel=zero2"]
    found = run_ranks(RANKS, go_on_with_deepspeed, words, outs, [source for _, source in goals], FURTHER)[0]
    for (name, source), went_on in zip(goals, found, strict=True):
        _same(went_on.state, trained[name].state)
        assert all(
            torch.equal(open_foreign(tmp_path / f"{name}-out")[1].read(key), went_on.state[key])
            for key in went_on.state
        )
        if source is not other:
            assert went_on.losses == trained[name].losses[3:]
            _same(went_on.end, trained[name].end)
    assert found[-1].losses == pytest.approx(trained["zero3"].losses[3:], rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "layout", "ranks"), rows([(2, "single", 1), (3, "fsdp", 2)], lambda stage, *_: stage == 3)
)
def test_adapters_go_on_with_their_moments(
    folder: Path,
    trained: dict[str, Trained],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: int,
    layout: str,
    ranks: int,
) -> None:
    name, base = f"zero{stage}-adapters", folder / f"base{stage}"
    words = [word for word in RUN if not word.startswith("model")]
    words += [f"model.path={base}", "model.weights=pretrained", "tuning=lora", "tuning.rank=4", "tuning.alpha=16"]
    words += ["tuning.target_modules=[q_proj,v_proj]", "tuning.dropout=0", f"parallel={layout}", "train.steps=5"]
    words += [f"optimizer.lr={open_foreign(folder / name)[1].record.next_lr}"]
    run = [f"train.run_dir={tmp_path / 'run'}", f"train.resume={folder / name}"]
    assert set(run_ranks(ranks, run_trainer, [*words, *run])) == {0}
    assert _losses(tmp_path / "run") == pytest.approx(trained[name].losses[3:], rel=1e-6)
    assert main(["import", str(folder / name), str(tmp_path / "never")]) == 2
    assert "holds adapters alone, of which only a run knows the model beneath; go on with" in capsys.readouterr().err


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(("spoil", "code", "line"), SPOILT)
def test_bad_folder_is_one_line(
    folder: Path,
    trained: dict[str, Trained],
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    code: int,
    line: str,
) -> None:
    copy = folder / f"bad_{spoil.__name__}"
    shutil.copytree(folder / "zero2", copy)
    spoil(copy / "global_step3")
    assert main(["import", str(copy), str(folder / "never")]) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert line in said[0]
    assert not (folder / "never").exists()


def test_frozen_parameters_are_refused(
    folder: Path, trained: dict[str, Trained], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(folder / "zero3-frozen"), str(folder / "never")]) == 2
    assert "a checkpoint in which some of them are frozen" in capsys.readouterr().err


def test_names_are_those_of_the_model(folder: Path, trained: dict[str, Trained]) -> None:
    """A wrapper module's prefix on all names is accepted. A checkpoint of another model is refused in one line."""
    copy = folder / "wrapped"
    shutil.copytree(folder / "zero3", copy)
    for file in copy.glob("*/*model_states.pt"):
        content = torch.load(file)
        content["param_shapes"] = [{f"inner.{name}": s for name, s in row.items()} for row in content["param_shapes"]]
        torch.save(content, file)
    _, source = open_foreign(copy, build_hf_config(load_config(RUN).model))
    assert sorted(source.names()) == sorted(trained["zero3"].state)
    assert torch.equal(source.read("exp_avg/lm_head.weight"), trained["zero3"].state["exp_avg/lm_head.weight"])
    for change, line in (
        (
            "model.config.vocab_size=62",
            "lm_head.weight has the shape [61, 32] there and [62, 32] in the model; give the",
        ),
        ("model.config.num_hidden_layers=3", "lacks model.layers.2."),
        ("model.config.num_hidden_layers=1", "has model.layers.1."),
    ):
        with pytest.raises(CheckpointMismatch, match=re.escape(line)):
            open_foreign(copy, build_hf_config(load_config([*RUN, change]).model))


def test_known_objects_are_stand_ins(folder: Path, trained: dict[str, Trained]) -> None:
    """The import accepts the objects that scripts pass as client_state, and executes none of them."""
    import argparse

    import numpy

    copy = folder / "client"
    shutil.copytree(folder / "zero1", copy)
    file = copy / "global_step3" / "mp_rank_00_model_states.pt"
    more = {
        "args": argparse.Namespace(lr=1.0),
        "rng": numpy.random.get_state(),
        "path": Path("x"),
        "n": numpy.float64(1),
    }
    torch.save({**torch.load(file), **more}, file)
    _, source = open_foreign(copy)
    assert source.record.step == 3
