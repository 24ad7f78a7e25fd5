"""Learning-rate schedules and parameter groups."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import get_scheduler

from configs.errors import EXIT_FINISHED
from configs.load import load_config
from tests.support.balance import balance
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from trainer.checkpoint.__main__ import main as checkpoint_main
from trainer.estimate.tracker import StorageTracker
from trainer.model.roles import Described, Role, describe
from trainer.optim.build import build_optimizer, learning_rates, lr_at, set_lr
from trainer.optim.options import read_options
from trainer.optim.placed import averaged
from trainer.optim.protocol import COUNTER, Held, Spread
from trainer.optim.table import OPTIMIZERS, ask, kept, kept_bytes, saved_state


def rates(*overrides: str) -> list[float]:
    config = load_config(["optimizer.lr=1.0", *overrides])
    return [lr_at(config, step) for step in range(config.train.steps)]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decaying_schedules_reach_the_floor_at_the_last_step(name: str) -> None:
    found = rates(f"scheduler={name}", "train.steps=10", "scheduler.warmup_steps=3", "scheduler.min_lr_ratio=0.2")
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[-1] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(found[2:]))


def test_constant() -> None:
    assert rates("scheduler=constant", "train.steps=4", "scheduler.warmup_steps=2") == [0.5, 1.0, 1.0, 1.0]


def test_warmup_stable_decay() -> None:
    keys = ("train.steps=10", "scheduler.warmup_steps=2", "scheduler.decay_steps=4", "scheduler.min_lr_ratio=0.0")
    assert rates("scheduler=wsd", *keys) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_linear_decay_has_the_slope_of_transformers() -> None:
    """transformers reaches 0 one step after the last. The schedules agree if its number of steps is one less."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=9)
    theirs = []
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates("scheduler=linear", "train.steps=10", "scheduler.min_lr_ratio=0.0") == pytest.approx(theirs)


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    optimizer = build_optimizer(model.named_parameters(), describe(model), load_config([]).optimizer)
    decayed, plain = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (5, 4)] and decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4,), (4,)] and plain["weight_decay"] == 0.0


BY_ROLE = ("optimizer.groups.embedding.lr=0.01", "optimizer.groups.vector.weight_decay=0.5")


def test_a_role_has_its_own_learning_rate_and_decay_logged_under_its_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    settings = load_config(["optimizer.lr=0.001", *BY_ROLE]).optimizer
    optimizer = build_optimizer(model.named_parameters(), describe(model), settings)
    set_lr(optimizer, 0.0005)
    found = {group["group"]: (len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {"decayed": (1, 0.1), "embedding": (1, 0.1), "vector": (3, 0.5)}
    assert learning_rates(optimizer) == pytest.approx({"decayed": 0.0005, "embedding": 0.005, "vector": 0.0005})


OF_ROLES = "optimizer.groups.matrix.name=lion optimizer.groups.vector.name=sgd optimizer.groups.vector.lr=0.01"


def test_each_role_is_updated_by_its_own_optimizer() -> None:
    """The updates and states equal those of each of the three optimizers alone."""
    found: list[dict[str, torch.Tensor]] = []
    kinds: list[set[str]] = []
    for words in (OF_ROLES, "optimizer.name=lion", "optimizer.name=sgd optimizer.lr=0.01", ""):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.Embedding(5, 4))
        optimizer = build_optimizer(model.named_parameters(), describe(model), load_config(words.split()).optimizer)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().cos()
            optimizer.step()
        kinds = kinds or [{*optimizer.state[p]} for p in model.parameters()]
        found.append({name: p.detach() for name, p in model.named_parameters()})
    mixed, lion, sgd, adamw = found
    expected = {"0.weight": lion, "1.weight": sgd, "1.bias": sgd, "2.weight": adamw}
    for name, alone in expected.items():
        torch.testing.assert_close(mixed[name], alone[name], rtol=1e-6, atol=0)
    assert kinds == [{"exp_avg"}, *[{"momentum_buffer"}] * 2, {"exp_avg", "exp_avg_sq", "step"}]


WEIGHT = Described(name="w", shape=(2, 3), role=Role.matrix)
IMPLEMENTATIONS = [(name, how) for name in ("adamw", "sgd") for how in ("auto", "fused", "foreach", "for_loop")]


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_every_implementation_makes_the_same_update(name: str, implementation: str) -> None:
    results = []
    for choice in (implementation, "for_loop"):
        config = load_config([f"optimizer={name}", f"optimizer.implementation={choice}"]).optimizer
        parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        optimizer = build_optimizer([("w", parameter)], {"w": WEIGHT}, config)
        for _ in range(3):
            parameter.grad = parameter.detach().cos()
            optimizer.step()
        results.append(parameter.detach())
    assert not torch.equal(results[0], torch.arange(6.0).reshape(2, 3))
    torch.testing.assert_close(results[0], results[1])


def test_adafactor_is_that_of_its_paper() -> None:
    """Shazeer and Stern 2018, algorithm 4, with the defaults of its section 9 (no first moment, relative steps)."""
    config = load_config(["optimizer=adafactor"]).optimizer
    torch.manual_seed(0)
    found = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    expected, rows, columns = found.detach().clone(), torch.zeros(5, 1), torch.zeros(1, 3)
    optimizer = build_optimizer([("w", found)], {"w": WEIGHT}, config)
    for step in range(1, 5):
        gradient = torch.randn(5, 3, dtype=torch.float64)
        found.grad = gradient.clone()
        optimizer.step()
        kept = 1 - step**-0.8
        rows = kept * rows + (1 - kept) * gradient.square().sum(1, keepdim=True)
        columns = kept * columns + (1 - kept) * gradient.square().sum(0, keepdim=True)
        update = gradient / (rows @ columns / rows.sum()).sqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        expected -= min(0.01, step**-0.5) * max(1e-3, expected.square().mean().sqrt().item()) * update
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=0)
    theirs = nn.Parameter(torch.ones(5, 3))
    reference, ours = (
        torch.optim.Adafactor([theirs], lr=0.01, eps=(1e-8, 1e-3), weight_decay=0.1),
        nn.Parameter(torch.ones(5, 3)),
    )
    settings = load_config(["optimizer=adafactor", "optimizer.weight_decay=0.1"]).optimizer
    same = build_optimizer([("w", ours)], {"w": WEIGHT}, settings)
    for _ in range(3):
        theirs.grad = torch.randn(5, 3)
        ours.grad = theirs.grad.clone()
        reference.step()
        same.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    kept_numbers = sum(tensor.numel() for kind, tensor in optimizer.state[found].items() if kind != "step")
    assert kept_numbers == 5 + 3


def test_eight_bits_are_close_and_small_tensors_and_embeddings_exact() -> None:
    moved = {}
    for name in ("adamw", "adamw_8bit"):
        config = load_config([f"optimizer={name}"]).optimizer
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(90, 100), nn.Linear(100, 90), nn.LayerNorm(90))
        described = describe(model)
        optimizer = build_optimizer(model.named_parameters(), described, config)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        for _ in range(20):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        moved[name] = {key: p.detach() - before[key] for key, p in model.named_parameters()}
        held = {key: optimizer.state[p] for key, p in model.named_parameters()}
    for key, change in moved["adamw_8bit"].items():
        expected = moved["adamw"][key]
        table = saved_state(described[key], config, "float32")
        tensors = [held[key][kind] for kind in table]
        assert [tensor.nbytes for tensor in tensors] == [one.nbytes for one in table.values()]
        if key == "1.weight":
            assert {tensor.dtype for tensor in tensors} == {torch.uint8, torch.float32}
            assert 0 < (change - expected).norm() / expected.norm() < 0.05
        else:
            torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-7)


TABLES = [(str(name), str(how)) for name, chosen in OPTIMIZERS.items() for how in chosen.IMPLEMENTATIONS]
TABLES += [("adafactor optimizer.groups.embedding.name=adamw optimizer.groups.vector.name=lion", "auto")]


@pytest.mark.parametrize(("name", "how"), [pair for pair in TABLES if pair[1] != "deepspeed_cpu"])
def test_tables_say_what_an_update_allocates(name: str, how: str) -> None:
    """The tables give the memory kept after an update and the temporary memory of the second update. The model has
    matrices of several sizes, an embedding and a vector."""
    config = load_config([*f"optimizer={name}".split(), f"optimizer.implementation={how}"]).optimizer
    model = nn.ModuleList([nn.Linear(256, 512, bias=False), nn.Linear(256, 128, bias=False)])
    model += [nn.Linear(256, 256, bias=False), nn.Embedding(64, 256), nn.LayerNorm(300)]
    described = describe(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter.data)
    optimizer = build_optimizer(model.named_parameters(), described, config)
    with StorageTracker() as tracker:
        optimizer.step()
        tracker.mark("second")
        optimizer.step()
    held = list(balance(tracker.events))
    second = next(index for index, (event, _) in enumerate(held) if event == "second")
    states = [tensor for about in described.values() for tensor in kept(about, config, "float32")]
    # Counters and other scalars are in host memory, which also holds the tensors on the CPU.
    tables = [ask(config).state(about, config, "float32") for about in described.values()]
    counters = sum(max(tensor.nbytes, 4) for table in tables for tensor in table.values() if not tensor.shape)
    assert 0 <= held[second][1] - sum(tensor.nbytes for tensor in states) <= max(counters, 4 * len(described))
    for name_, parameter in model.named_parameters():
        found = {kind: value for kind, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        expected = ask(config).state(described[name_], config, "float32")
        assert found.keys() - {COUNTER} == expected.keys() - {COUNTER}
        for kind, tensor in expected.items():
            value = found[kind]
            assert (tuple(value.shape), value.dtype) == (tensor.shape, getattr(torch, tensor.dtype)), (name_, kind)
    matrices = [Held(whole=about, shape=about.shape) for about in described.values() if len(about.shape) > 1]
    needed = ask(config).temporaries(matrices, config, "float32", Spread())
    assert max(size for _, size in held[second:]) - held[second][1] == pytest.approx(needed, rel=0.01, abs=4096)


def test_what_is_kept_of_eight_bits() -> None:
    settings = load_config(["optimizer=adamw_8bit"]).optimizer
    matrix = Described(name="w", shape=(100, 90), role=Role.matrix)
    assert kept_bytes([matrix], settings, "float32") == 2 * (9000 + 4 * 100), "a row is a block here"
    wide = Described(name="w", shape=(100, 900), role=Role.matrix)
    assert kept_bytes([wide], settings, "float32") == 2 * (90000 + 4 * 100 * 4)
    assert kept_bytes([wide.cut((50, 300))], settings, "float32") == 2 * (15000 + 4 * 50 * 4), "scales of whole rows"
    assert kept_bytes([Described(name="e", shape=(100, 90), role=Role.embedding)], settings, "float32") == 8 * 9000


USERS = "tests.support.optimizers_of_users"


def test_what_a_custom_optimizer_keeps() -> None:
    """The prediction holds for shapes that the probe has not seen. 8-bit states have blocks by number of elements."""
    matrix, vector = Described(name="w", shape=(100, 900), role=Role.matrix), Described(name="b", shape=(50,))
    for target, of_matrix, of_vector in [
        ("torch.optim.NAdam", 8 * 90000 + 4, 8 * 50 + 4),
        ("torch.optim.Adafactor", 4 * 1000, 4 * 50),
        ("bitsandbytes.optim.AdamW8bit", 2 * (90000 + 4 * 359 + 4 * 256), None),
    ]:
        settings = load_config(["optimizer=custom", f"optimizer.target={target}"]).optimizer
        assert kept_bytes([matrix], settings, "float32") == pytest.approx(of_matrix, rel=1e-4)
        assert of_vector is None or kept_bytes([vector], settings, "float32") == of_vector
    assert kept_bytes([matrix], load_config(["optimizer=custom"]).optimizer, "bfloat16") == 4 * 90000


def test_lion_is_that_of_its_paper() -> None:
    """Chen et al. 2023, algorithm 2."""
    settings = load_config(["optimizer=lion", "optimizer.lr=0.01", "optimizer.weight_decay=0.1"]).optimizer
    found = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    expected, momentum = found.detach().clone(), torch.zeros(2, 3)
    optimizer = build_optimizer([("w", found)], {"w": WEIGHT}, settings)
    for _ in range(4):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        found.grad = gradient.clone()
        optimizer.step()
        expected -= 0.01 * ((0.9 * momentum + 0.1 * gradient).sign() + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-15)


def test_schedule_free_is_that_of_its_paper() -> None:
    """Defazio et al. 2024, algorithm 1; x and z are stored, and y is computed from them."""
    words = ["optimizer=schedule_free", "optimizer.lr=0.1", "optimizer.weight_decay=0.1"]
    settings = load_config(words).optimizer
    found = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    z, x, second, weights, largest = found.detach().clone(), found.detach().clone(), torch.zeros(2, 3), 0.0, 0.0
    optimizer = build_optimizer([("w", found)], {"w": WEIGHT}, settings)
    for step, lr in enumerate((0.05, 0.1, 0.08, 0.1), start=1):
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(found.detach(), y, rtol=1e-12, atol=1e-15)
        gradient = torch.randn(2, 3, dtype=torch.float64)
        found.grad = gradient.clone()
        set_lr(optimizer, lr)
        optimizer.step()
        second = 0.95 * second + 0.05 * gradient**2
        z = z - lr * (gradient / ((second / (1 - 0.95**step)).sqrt() + 1e-8) + 0.1 * y)
        largest = max(largest, lr)
        weights += largest**2
        x = x + (z - x) * largest**2 / weights
    trained = found.detach().clone()
    for room in (None, torch.zeros_like(trained)):
        found.grad = room
        with averaged(optimizer, ask(settings).average(settings)):
            torch.testing.assert_close(found.detach(), x, rtol=1e-12, atol=1e-15)
        assert torch.equal(found.detach(), trained), "not the same bits as before"
        assert room is None or not room.any()


def train_and_export(folder: str, *words: str) -> tuple[dict[str, torch.Tensor], ...]:
    """Returns the weights that a run exports, those exported from its checkpoint, and those in the checkpoint."""
    tiny = ["model=tiny", "model.config.num_hidden_layers=1", "data=synthetic", "data.seq_len=16", "cluster.device=cpu"]
    steps = ["train.steps=3", "train.global_batch_size=4", f"train.run_dir={folder}/run", "train.eval_samples=2"]
    assert run_trainer([*tiny, *steps, *words]) == EXIT_FINISHED
    assert checkpoint_main(["export", f"{folder}/run", f"{folder}/out"]) == EXIT_FINISHED
    exported = [load_file(f"{folder}/{place}/model.safetensors") for place in ("run/model", "out")]
    saved = load_file(next(Path(folder, "run/checkpoints").glob("step-*/rank-*.safetensors")))
    return *exported, {name.removeprefix("model/"): t for name, t in saved.items() if name.startswith("model/")}


def test_schedule_free_exports_its_average(tmp_path: Path) -> None:
    words = ("optimizer=schedule_free", "scheduler=constant")
    ((finished, later, trained),) = run_ranks(1, train_and_export, str(tmp_path), *words, timeout=240)
    assert finished.keys() == later.keys() and finished.keys() <= trained.keys()
    for name, value in finished.items():
        assert torch.equal(value, later[name]) and not torch.equal(value, trained[name]), name


def test_muon_updates_matrices_and_adamw_the_rest_each_at_its_own_rate() -> None:
    settings = load_config(["optimizer=muon", "optimizer.lr=0.02", "optimizer.options.adamw_lr=1e-3"]).optimizer
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = build_optimizer(model.named_parameters(), describe(model), settings)
    set_lr(optimizer, 0.01)
    assert learning_rates(optimizer) == pytest.approx({"muon": 0.01, "adamw": 5e-4})
    shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert shapes == [[(3, 4)], [(5, 4)], [(3,), (3,), (3,)]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_options_file_holds_the_defaults_of_its_module() -> None:
    for name, chosen in OPTIMIZERS.items():
        given = load_config([f"optimizer={name}"]).optimizer
        assert given.name is name
        if chosen.OPTIONS is not None:
            assert read_options(given, chosen.OPTIONS) == chosen.OPTIONS()
            assert given.options.keys() == {item.name for item in fields(chosen.OPTIONS)}
