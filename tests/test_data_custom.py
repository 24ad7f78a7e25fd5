"""`data.target`: a user's class provides the samples, which are checked, divided and resumed like any others."""

from __future__ import annotations

from itertools import islice

import pytest

from configs.errors import CookbookError, DataError, RankProblem
from configs.load import load_config
from tests.support.data_cases import data_of, rows_of, rows_of_all_ranks, step_rows
from tests.support.data_of_users import Endless, Tensors
from trainer.data import IGNORED
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

USERS = "tests.support.data_of_users"


def custom(name: str, *options: str) -> list[str]:
    return ["data=custom", f"data.target={USERS}.{name}", *(f"data.options.{option}" for option in options)]


ROWS, PLACED, ENDLESS = custom("Rows", "count=50"), custom("Placed", "count=50"), custom("Endless", "count=50")
NO_VALIDATION = "train.eval_samples=0"


def test_samples_become_rows_of_inputs_and_labels() -> None:
    ids, labels = list(range(5)), [*range(1, 5), IGNORED]
    data = data_of(*ROWS, "data.shuffle=false", "train.micro_batch_size=1")
    rows = [row for step in step_rows(data, steps=100) for row in step]
    everything = {*rows}
    # Without shuffling, samples keep their own order. Some of them are held out.
    first = [row[0] for row in rows[:48]]
    assert first == sorted({*first})
    held = {row for batch in data.validation() for row in rows_of(batch) if set(row[16:]) != {IGNORED}}
    assert len(everything) == 48 and len(held) == 2 and not everything & held
    whole = everything | held
    assert (*ids[:4], *[0] * 12, *labels[:3], *[IGNORED] * 13) in whole
    # The sample has 17 tokens, and the last one is only a label.
    assert (*range(13, 29), *range(14, 30)) in whole
    assert (data.describe(), data.length) == (
        "custom: tests.support.data_of_users.Rows, 48 samples (2.1 epochs in 100 steps); validation 2 samples",
        100,
    )
    # Labels follow transformers and are not shifted. Masked tokens are left out. The class has its own validation.
    Tensors.asked = 0
    data = data_of(*custom("Tensors", "count=20"), "data.shuffle=false", "train.micro_batch_size=1")
    assert next(iter(step_rows(data, steps=1)))[0] == (0, 1, 2, 3, 4, *[0] * 11, -100, 2, -100, 4, *[-100] * 12)
    assert {row[0] for batch in data.validation() for row in rows_of(batch) if row[16] != IGNORED} == set(
        range(100, 105)
    )
    assert Tensors.asked == 1
    # A class with its own validation is trained on whole, even if the run does not validate.
    assert "custom: tests.support.data_of_users.Tensors, 20 samples" in data.describe()
    assert "Tensors, 20 samples" in data_of(*custom("Tensors", "count=20"), NO_VALIDATION).describe()


@pytest.mark.parametrize("overrides", [ROWS, [*PLACED, NO_VALIDATION], [*ENDLESS, NO_VALIDATION]])
def test_layouts_loaders_and_a_resume_change_nothing(overrides: list[str]) -> None:
    reference = rows_of_all_ranks([*overrides, "train.micro_batch_size=8"], ranks=1, steps=20)
    for ranks, micro in ((2, 4), (4, 2)):
        layout = [*overrides, f"train.micro_batch_size={micro}"]
        assert rows_of_all_ranks(layout, ranks=ranks, steps=20) == reference
    data = data_of(*overrides, "train.micro_batch_size=8", "data.num_workers=1")
    assert [sorted(step) for step in step_rows(data, steps=20)] == reference
    steps = data_of(*overrides, "train.micro_batch_size=8")
    walked = islice(steps.steps(), 15)
    marks = [steps.mark() for _ in walked]
    Endless.made = 0
    resumed = islice(data_of(*overrides, "train.micro_batch_size=8").steps(15, marks[14]), 5)
    assert [sorted(row for batch in step for row in rows_of(batch)) for step in resumed] == reference[15:]
    # A class that knows its place reads nothing before it: only 5 steps of 8, one step ahead, and the checked sample.
    if overrides[:2] == PLACED[:2]:
        assert marks[14] == {"position": 112, "state": {"place": 12}} and Endless.made <= 5 * 8 + 8 + 1


def test_identity_is_the_content_or_what_the_class_says() -> None:
    def fingerprint(name: str, *options: str) -> str:
        return data_of(*custom(name, *options)).fingerprint

    assert fingerprint("Rows", "count=50") == fingerprint("Rows", "count=50") != fingerprint("Rows", "count=51")
    assert fingerprint("Rows", "count=50") != fingerprint("Rows", "count=50", "first=1")
    assert fingerprint("Tensors", "count=50") == fingerprint("Tensors", "count=50", "first=1")


def test_a_stream_of_torch_may_have_a_length() -> None:
    assert data_of(*custom("Measured"), NO_VALIDATION).describe().startswith(f"custom: {USERS}.Measured, a stream")


def test_in_a_mixture() -> None:
    mix = [f"data.mixture.{name}.{key}" for name in "ab" for key in ("weight=1", "source=custom")]
    parts = [
        *(f"data.mixture.a.{key}" for key in (f"target={USERS}.Rows", "options.count=30")),
        *(f"data.mixture.b.{key}" for key in (f"target={USERS}.Placed", "options.count=30")),
    ]
    data = data_of(*mix, *parts, NO_VALIDATION)
    rows = [row for step in step_rows(data, steps=10) for row in step]
    assert data.samples_of(range(20)) == {"a": 10, "b": 10} and sum(row[18] != IGNORED for row in rows) >= 10


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data=custom"], ["data.target=null: data=custom needs it: data.target=package.module.Class; give it"]),
        (custom("Nothing"), [f"data.target={USERS}.Nothing: {USERS} has no Nothing; mend the path"]),
        (["data=custom", "data.target=math.pi"], ["data.target=math.pi: is no class; give one, whose objects are the"]),
        (custom("Neither"), [f"data.target={USERS}.Neither: has neither __len__ and __getitem__ nor __iter__; give"]),
        (
            custom("Rows", "cuont=3", "vocab_size=9"),
            [
                f"data.options.cuont=3: {USERS}.Rows has no such option; did you mean data.options.count?",
                "data.options.vocab_size=9: is no option; leave it out",
                f"data.options.count: {USERS}.Rows needs it; give data.options.count=...",
            ],
        ),
        (
            custom("Half", "count=3"),
            [
                f"data.target={USERS}.Half: has state_dict alone, and a resumed run needs both state_dict and load_st",
                f"data.target={USERS}.Half: a stream without validation(), so nothing can be held out; give it one, ",
            ],
        ),
        (
            [*custom("Tensors", "count=9"), "data.validation_fraction=0.5"],
            [f"data.validation_fraction=0.5: data.target={USERS}.Tensors has a validation(), and nothing is held out;"],
        ),
        ([*PLACED, NO_VALIDATION, "train.epochs=1"], ["train.epochs=1: how many samples data=custom has is not kno"]),
        ([*ROWS, "data.document_mask=true"], ["data.document_mask=true: data=custom has no documents; choose other"]),
        (["data.target=a.B"], ["data.target=a.B: is for data=custom, this is data=builtin; choose data=custom, or le"]),
    ],
)
def test_what_the_class_lacks_is_said_before_an_object_is_made(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(CookbookError) as raised:
        make_plan(load_config([*overrides, "parallel=single"]), Machine(world_size=1))
    for line in says:
        assert [problem for problem in raised.value.problems if problem.startswith(line)], raised.value.problems


def test_each_sample_that_breaks_a_rule_is_said_before_the_run() -> None:
    with pytest.raises(DataError) as raised:
        data_of(*custom("Wrong", "count=10"), NO_VALIDATION, "data.validation_fraction=0")
    key = f"data.target={USERS}.Wrong: sample"
    assert raised.value.problems == (
        f"{key} 0 is no mapping with input_ids (list); give one",
        f"{key} 1 has weight, which nothing reads; leave it out",
        f"{key} 2: input_ids must be whole numbers in one dimension; give a list of them",
        f"{key} 3: input_ids must be whole numbers in one dimension; give a list of them",
        f"{key} 4 has 1 tokens; give from 2 to data.seq_len + 1 = 17",
        f"{key} 5 has 20 tokens; give from 2 to data.seq_len + 1 = 17",
        f"{key} 6 has 3 input_ids and 2 labels; give one for each token",
        f"{key} 7: attention_mask must be ones and then zeros; put the padding behind the tokens",
        f"{key} 8: input_ids has 1 to 700; give 0 to 511, the model's vocabulary",
        f"{key} 9: labels has -1 to 1; give 0 to 511, the model's vocabulary, or -100, which is ignored",
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_breaks_in_mid_run_ends_it_in_one_line(workers: int) -> None:
    nothing_held_out = [NO_VALIDATION, "data.validation_fraction=0", "data.shuffle=false"]
    data = data_of(*custom("Late", "count=40"), *nothing_held_out, f"data.num_workers={workers}")
    with pytest.raises(RankProblem, match=r"sample 1 fails \(KeyError: 1, at \S+/data_of_users\.py:\d+ in "):
        step_rows(data, steps=3)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            custom("Rows", "count=x"),
            "len\\(\\) fails \\(TypeError: 'str' object cannot be interp",
        ),
        (custom("Rows", "count=0"), "has no sample; give some"),
        (custom("Rows", "count=1"), "no sample is left for validation \\(data.validation_fraction=0.05 of 1\\)"),
        ([*custom("Endless", "count=0"), NO_VALIDATION], "its stream holds no sample; give some"),
        ([*custom("Endless", "count=x"), NO_VALIDATION], "sample 0 fails \\(TypeError: 'str' object"),
    ],
)
def test_what_its_object_lacks(overrides: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        data_of(*overrides)
