"""Each unsupported combination with an optimizer is refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest

from configs import by_path
from configs.errors import ConfigError
from configs.load import load_config
from tests.support.refusals import assert_refused
from trainer.make_plan import make_plan
from trainer.model.roles import describe
from trainer.optim import by_role
from trainer.passes import prepare_model
from trainer.plan.machine import Machine

USERS = "tests.support.optimizers_of_users"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "matrix.name=lion parallel=zero1",
            "optimizer.groups.matrix.name=lion: DeepSpeed partitions the states of one",
        ),
        ("matrix.name=lion optimizer=mezo", "optimizer.groups.matrix.name=lion: mezo moves all parameters along one"),
        ("matrix.name=mezo", "optimizer.groups.matrix.name=mezo: mezo moves all parameters along one direction"),
        ("vector.name=muon", "optimizer.groups.vector.name=muon: muon leaves such parameters to adamw; use adamw"),
        (
            "matrix.name=muon optimizer.in_backward=true",
            "optimizer.in_backward=true: muon deals all matrices of a rank",
        ),
        ("head.name=schedule_free", "scheduler.name=cosine: optimizer.groups.head.name=schedule_free averages weights"),
        ("head.name=custom", "optimizer.groups.head.name=custom: needs optimizer.target=package.module.Class"),
        (
            "head.name=lion optimizer.implementation=fused",
            "optimizer.implementation=fused: adamw with lion has no such implementation; use for_loop or auto",
        ),
    ],
)
def test_roles_with_optimizers_of_their_own_refuse(words: str, line: str) -> None:
    assert_refused(f"optimizer.groups.{words}".split(), line)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            "optimizer.groups.router.lr=0.01",
            "optimizer.groups.router.lr=0.01: nothing that is trained of LlamaForCausal",
        ),
        ("optimizer.groups.head.lr=0.01 tuning=lora", "optimizer.groups.head.lr=0.01: nothing that is trained of"),
    ],
)
def test_a_role_that_nothing_has_is_one_line(overrides: str, line: str) -> None:
    config = load_config(["model=tiny", *overrides.split()])
    model = prepare_model(config)
    described = describe(model)
    with pytest.raises(ConfigError) as refused:
        by_role.check(
            [described[name] for name, parameter in model.named_parameters() if parameter.requires_grad],
            config.optimizer,
            type(model).__name__,
        )
    (problem,) = refused.value.problems
    assert problem.startswith(line) and "it has matrix" in problem


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel=zero2"], "optimizer.name=adamw_8bit: blocks of 256 values of a matrix's row share a scale"),
        (
            ["optimizer.implementation=foreach"],
            "optimizer.implementation=foreach: adamw_8bit has no such implementation; use for_loop or auto",
        ),
    ],
)
def test_eight_bits_refuse(words: list[str], line: str) -> None:
    assert_refused(["optimizer=adamw_8bit", *words], line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel=zero1"], "optimizer.name=adafactor: needs the rows and columns of matrices, and ZeRO's partitions"),
        (
            ["optimizer.implementation=fused"],
            "optimizer.implementation=fused: adafactor has no such implementation; use for_loop or auto",
        ),
        (["optimizer.eps=1e-30"], "optimizer.eps=1e-30: adafactor squares it"),
        (
            ["optimizer.beta2=0.9"],
            "optimizer.beta2=0.9: adafactor does not read it, adamw, adamw_8bit, muon, lion, schedule_free do",
        ),
        (["optimizer.options.lr=0.9"], "optimizer.options.lr=0.9: adafactor has no such option; it has none"),
    ],
)
def test_adafactor_refuses(words: list[str], line: str) -> None:
    assert_refused(["optimizer=adafactor", *words], line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel=zero2"], "optimizer.name=muon: orthogonalises whole matrices, and ZeRO's partitions are flat rows"),
        (["tuning=lora"], "tuning.method=lora: optimizer.name=muon would orthogonalise an adapter's two factors"),
        (["optimizer.options.adjust_lr=original"], "optimizer.options.adjust_lr=original: optimizer.lr=0.0003 is then"),
        (["optimizer.options.momentun=0.9"], "optimizer.options.momentun=0.9: muon has no such option; did you mean"),
        (["optimizer.options.momentum=1"], "optimizer.options.momentum=1: must be 0 or more and less than 1"),
        (["optimizer.options.steps=2.5"], "optimizer.options.steps=2.5: must be a whole number"),
        (["optimizer.options.nesterov=3"], "optimizer.options.nesterov=3: must be true or false"),
        (["optimizer.options.adjust_lr=none"], "optimizer.options.adjust_lr=none: must be one of original, match"),
        (
            ["optimizer.options.coefficients=[1,2]"],
            "optimizer.options.coefficients=[1, 2]: must be a list of 3 numbers",
        ),
        (["optimizer.options.adamw_lr=0"], "optimizer.options.adamw_lr=0: must be greater than 0"),
    ],
)
def test_muon_refuses(words: list[str], line: str) -> None:
    assert_refused(["optimizer=muon", *words], line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optimizer.target=null"], "optimizer.name=custom: needs optimizer.target=package.module.Class"),
        (["optimizer.target=Adam"], "optimizer.target=Adam: is no path of a class"),
        (["optimizer.target=..Adam"], "optimizer.target=..Adam: is no path of a class"),
        (["optimizer.target=no.Adam"], "optimizer.target=no.Adam: cannot import no (ModuleNotFoundError: No module"),
        (["optimizer.target=torch.optim.NAdm"], "optimizer.target=torch.optim.NAdm: torch.optim has no NAdm; did you"),
        (["optimizer.target=torch.nn.Linear"], "optimizer.target=torch.nn.Linear: is no subclass of torch.optim"),
        (["optimizer.target=torch.optim.LBFGS"], "optimizer.target=torch.optim.LBFGS: its step failed on a parameter"),
        (["optimizer.target=torch.optim.Muon"], "optimizer.target=torch.optim.Muon: cannot be built (ValueError: Muon"),
        (["optimizer.options.ep=1"], "optimizer.options.ep=1: torch.optim.RAdam has no such option; did you mean opti"),
        (["optimizer.options.lr=1"], "optimizer.options.lr=1: is no option; give optimizer.lr"),
        (["optimizer.options.eps=-1"], "optimizer.options: torch.optim.RAdam refuses them (ValueError: Invalid eps"),
        ([f"optimizer.target={USERS}.Signs", "optimizer.weight_decay=1"], "optimizer.weight_decay=1.0: tests.support"),
        (
            [f"optimizer.target={USERS}.Columns", "parallel=fsdp"],
            f"optimizer.target={USERS}.Columns: is not element by element (the columns of a matrix are updated",
        ),
        (
            [f"optimizer.target={USERS}.Together", "parallel=pipeline"],
            f"optimizer.target={USERS}.Together: is not element by element (the rows of a matrix are updated",
        ),
        (
            ["optimizer.target=torch.optim.Adafactor", "parallel=zero1"],
            "optimizer.target=torch.optim.Adafactor: is not element by element (the rows of a matrix are updated toget",
        ),
        (
            ["optimizer.target=torch.optim.NAdam", "parallel=zero2"],
            "optimizer.target=torch.optim.NAdam: keeps mu_product of each parameter, and ZeRO's partitions are flat",
        ),
        ([f"optimizer.target={USERS}.Forgets"], f"optimizer.target={USERS}.Forgets: keeps k, which a checkpoint does"),
        (
            ["optimizer.target=bitsandbytes.optim.AdamW8bit"],
            "optimizer.target=bitsandbytes.optim.AdamW8bit: keeps absmax1 and absmax2, which a checkpoint does",
        ),
        *(
            (
                [f"optimizer.target={USERS}.Rounds", f"parallel={layout}"],
                f"optimizer.target={USERS}.Rounds: its updates draw random numbers, each process draws others",
            )
            for layout in ("ddp", "tensor")
        ),
        (["optimizer.beta1=0.8"], "optimizer.beta1=0.8: custom does not read it"),
        (
            ["optimizer.in_backward=true", "parallel=ddp"],
            "optimizer.in_backward=true: optimizer.name=custom updates all",
        ),
    ],
)
def test_custom_optimizers_refuse(words: list[str], line: str) -> None:
    assert_refused(["optimizer=custom", *words], line)


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.target=torch.optim.RMSprop", "optimizer.options.momentum=0.9", "parallel=tensor"],
        ["parallel=zero1"],
        [f"optimizer.target={USERS}.Signs", "parallel=fsdp"],
        [f"optimizer.target={USERS}.Columns", "parallel=ddp"],
        [f"optimizer.target={USERS}.Rounds", "parallel=fsdp"],
        [f"optimizer.target={USERS}.Forgets", "parallel=fsdp", "checkpoint.every=0"],
        ["optimizer.target=bitsandbytes.optim.AdamW8bit", "parallel=ddp", "checkpoint.every=0"],
    ],
)
def test_custom_optimizers_are_accepted(words: list[str]) -> None:
    make_plan(load_config(["optimizer=custom", *words]), Machine(world_size=2, local_world_size=2))


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_one_rank_shards_nothing(name: str) -> None:
    """With one rank, optimizers that need whole matrices are accepted under layouts that shard matrices."""
    make_plan(load_config(["parallel=fsdp", f"optimizer={name}", "cluster.gpus_per_node=1"]), Machine())


def test_one_rank_shares_no_weight() -> None:
    given = ["optimizer=custom", f"optimizer.target={USERS}.Rounds", "parallel=ddp", "cluster.gpus_per_node=1"]
    make_plan(load_config(given), Machine())


def test_a_target_without_custom_is_refused() -> None:
    line = "optimizer.target=torch.optim.NAdam: adamw does not read it, custom does; leave it out"
    assert_refused(["optimizer.target=torch.optim.NAdam"], line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel=zero2", "scheduler=constant"], "optimizer.name=schedule_free: evaluates an average of the weights"),
        ([], "scheduler.name=cosine: optimizer.name=schedule_free averages weights instead of decaying the learning"),
        (
            ["scheduler=constant", "optimizer.beta1=0"],
            "optimizer.beta1=0.0: schedule_free's average is found from beta1",
        ),
    ],
)
def test_schedule_free_refuses(words: list[str], line: str) -> None:
    assert_refused(["optimizer=schedule_free", *words], line)


def test_a_hidden_library_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trainer` hides a library from transformers, not from the user."""
    (tmp_path / "hidden_library.py").write_text("class Optimizer: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(by_path, "HIDDEN", "hidden_library")
    monkeypatch.setitem(sys.modules, "hidden_library", cast(Any, None))
    assert by_path.find("hidden_library.Optimizer", "optimizer.target=hidden_library.Optimizer").__name__ == "Optimizer"
