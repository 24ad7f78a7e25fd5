"""Every YAML of the configuration composes and plans, and every mistake is answered in one line."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

import configs
from configs.errors import ConfigError
from configs.keys import schema_keys
from configs.load import chosen_options, expand_sweep, from_yaml, group_options, load_config, to_yaml
from configs.overrides import quote_value
from configs.schema import Config
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

CONFIGS = Path(configs.__file__).parent
ROOT = CONFIGS.parent
FILES = sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.glob("*/*.yaml"))

# Further overrides that an option needs.
COMPANIONS = {
    "cluster/kubernetes.yaml": ["cluster.gpus_per_node=8"],
    "cluster/ray.yaml": ["cluster.gpus_per_node=8"],
    "cluster/slurm.yaml": ["cluster.gpus_per_node=8"],
    "data/custom.yaml": ["data.target=tests.support.data_of_users.Rows", "data.options.count=9"],
    "data/files.yaml": ["data.paths=[corpus.txt]"],
    "data/chat.yaml": ["data.paths=[chats.jsonl]"],
    "data/hub.yaml": ["data.name=some/name"],
    "launcher/python.yaml": ["parallel=single"],
    "logging/custom.yaml": ["logging.target=tests.support.trackers_of_users.Lines", "logging.options.file=x"],
    "model/custom.yaml": ["model.target=tests.support.models_of_users.Gated"],
    "optimizer/schedule_free.yaml": ["scheduler=constant"],
    "parallel/zero3_nvme.yaml": ["parallel.offload.nvme_path=/nvme"],
    "parallel/expert.yaml": ["model=mixtral_8x7b"],
    "parallel/expert_fsdp.yaml": ["model=mixtral_8x7b"],
}

# Published parameter counts. Tied embeddings are counted once.
PARAMETERS = {
    "deepseek_v3": 671_026_404_352,
    "gemma2_2b": 2_614_341_888,
    "glm_4_5_air": 106_852_245_504,
    "gpt2": 124_439_808,
    "gpt_oss_120b": 116_829_156_672,
    "gpt_oss_20b": 20_914_757_184,
    "llama2_13b": 13_015_864_320,
    "llama2_7b": 6_738_415_616,
    "llama3_1_405b": 405_853_388_800,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_235b_a22b": 235_093_634_560,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_8b": 8_190_735_360,
}
# Total and active parameters in billions, as the authors publish them, and how many of the two ends of the model
# (embedding, head) each count leaves out. gpt-oss leaves the embedding out of the active count. GLM leaves both ends
# out of both counts, and its authors count the layer that predicts a second token, which this model lacks.
PUBLISHED = {
    "deepseek_v3": (671, 37, 0, 0),
    "glm_4_5_air": (106, 12, 2, 2),
    "gpt_oss_120b": (116.83, 5.13, 0, 1),
    "gpt_oss_20b": (20.91, 3.61, 0, 1),
    "mixtral_8x7b": (46.7, 12.9, 0, 0),
    "qwen3_235b_a22b": (235, 22, 0, 0),
    "qwen3_30b_a3b": (30.5, 3.3, 0, 0),
}


def words_for(file: str) -> list[str]:
    group, name = file.removesuffix(".yaml").split("/")
    # Unless the option sets the layout, use one that fits any number of processes.
    layout = [] if group in ("parallel", "experiment") else ["parallel=ddp"]
    return [*layout, f"{group}={name}", *COMPANIONS.get(file, [])]


def test_files_were_found() -> None:
    assert len(FILES) >= 80
    assert set(COMPANIONS) <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_yaml_composes_and_plans(file: str) -> None:
    config = load_config(words_for(file))
    for machine in (Machine(), Machine(gpus=8)):
        plan = make_plan(config, machine)
        assert plan.world_size >= 1
        assert plan.describe()
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("file", FILES)
def test_every_yaml_says_what_it_is_and_derives_nothing(file: str) -> None:
    text = (CONFIGS / file).read_text()
    assert text.startswith("#")
    # An interpolation could read the time or the environment, so ranks would compose different configurations.
    assert "${" not in text
    body = yaml.safe_load(text)
    if "preset" in body:
        assert body["preset"] == Path(file).stem


def header_commands() -> list[str]:
    lines = [line for file in FILES for line in (CONFIGS / file).read_text().splitlines()]
    found = [re.match(r"#\s+python -m (?:launch|trainer) (.*?)(?:\s{3,}.*)?$", line) for line in lines]
    return [match[1] for match in found if match]


def test_header_commands_were_found() -> None:
    assert len(header_commands()) >= 35


@pytest.mark.parametrize("command", header_commands())
def test_commands_in_the_headers_plan(command: str) -> None:
    make_plan(load_config(shlex.split(command)), Machine(gpus=8))


def test_every_published_model_has_a_known_size() -> None:
    assert set(group_options()["model"]) - set(PARAMETERS) == {"custom", "tiny", "tiny_gpt2", "tiny_qwen3"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_a_published_model(name: str) -> None:
    from trainer.flops import count_parameters
    from trainer.model.build import build_hf_config, build_model

    config = load_config([f"model={name}"])
    model = build_model(config.model, build_hf_config(config.model))
    total, active = (count_parameters(model, active=active) for active in (False, True))
    text = (CONFIGS / f"model/{name}.yaml").read_text()
    assert total == PARAMETERS[name]
    assert f"{total:,} parameters" in text
    if name not in PUBLISHED:
        assert active == total
        return
    assert f"{active:,} active for a token" in text
    *published, without_total, without_active = PUBLISHED[name]
    end = model.config.vocab_size * model.config.hidden_size
    assert (total - without_total * end, active - without_active * end) == pytest.approx(
        tuple(billions * 1e9 for billions in published), rel=0.02
    )


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("train.steps", "train.steps: write key=value"),
        ("=3", "=3: write key=value"),
        ("+train.steps=3", "train.steps is there already; write train.steps=3"),
        ("+experiment=demo", "experiment is there already; write experiment=demo"),
        ("++trian.steps=3", "no key can be added or removed; write trian.steps=value, for a key that exists"),
        ("~train.steps", "no key can be added or removed; write train.steps=value, for a key that exists"),
        (
            "train.stpes=3",
            "train.stpes=3: no such key; did you mean train.steps? train has steps, epochs, micro_batch_size",
        ),
        ("train.lr=3", "train.lr=3: no such key; did you mean optimizer.lr? train has steps"),
        ("lr=3", "lr=3: no such key; did you mean optimizer.lr?"),
        ("trian.steps=3", "trian.steps=3: no such key; did you mean train.steps?"),
        ("colour=red", "colour=red: no such key; the sections are model, data, parallel"),
        ("hydra.run.dir=x", "hydra.run.dir=x: no such key; the sections are model, data, parallel"),
        (
            "parallel.offload=cpu",
            "parallel.offload=cpu: is a section; set one of parallel.offload.optimizer, parallel.",
        ),
        ("model.architecture.hidden_size=8", "published dimensions; set model.config.hidden_size"),
        ("parallel=nope", "parallel=nope: no such option; choose 3d, "),
        ("model=", "model=: no such option; choose custom, deepseek_v3, gemma2_2b, "),
        ("experiment=nope", "experiment=nope: no such option; choose demo"),
        ("train.steps=abc", "train.steps=abc: must be a whole number"),
        ("train.steps=1e6", "train.steps=1e6: must be a whole number"),
        ("train.steps=null", "train.steps=null: must be a whole number"),
        ("train.micro_batch_size=x", "train.micro_batch_size=x: must be a whole number or null"),
        ("optimizer.lr=fast", "optimizer.lr=fast: must be a number"),
        ("dry_run=maybe", "dry_run=maybe: must be true or false"),
        ("model.attention=nope", "model.attention=nope: choose auto, sdpa, eager, flash_attention_2"),
        ("parallel.offload.optimizer=disk", "parallel.offload.optimizer=disk: choose none, cpu, nvme"),
        ("data.paths=corpus.txt", "data.paths=corpus.txt: must be a list: [a,b]"),
        ("model.config=3", "model.config=3: must be a dictionary: {a: 1, b: 2}"),
        ("data.roles={1: user}", "data.roles={1: user}: its name 1 is no text; quote it in YAML, or write it w"),
        (
            "cluster.ray.resources={TPU: [1]}",
            "cluster.ray.resources={TPU: [1]}: must be a dictionary of numbers: {a: 1",
        ),
        ("data.roles=user", "data.roles=user: must be a dictionary of texts: {a: b, c: d}"),
        ("data.validation_sets={a: b/}", "data.validation_sets={a: b/}: must be a dictionary of lists: {a: [b], c: "),
        ("train.seed=1,2", "one value expected; for a list write train.seed=[1,2], for several runs add -m"),
        (
            "data.paths=[a",
            'data.paths=[a: the value cannot be read; close its brackets, or quote it: \'data.paths=["a=b", ',
        ),
        ("model.config.a=[1", "model.config.a=[1: the value cannot be read; close its brackets, or quote it"),
    ],
)
def test_a_wrong_word_is_one_line(word: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["model=gpt2", word])
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]
    assert caught.value.problems[0].startswith(word.split("=")[0])
    assert "\n" not in str(caught.value)


def test_all_wrong_words_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["train.stpes=3", "parallel=nope", "train.seed=1"])
    assert len(caught.value.problems) == 2


def test_open_dictionaries_take_any_key() -> None:
    config = load_config(["model.config.num_hidden_layers=2", "model.config.new={a: 1}", "logging.options.entity=us"])
    assert config.model.config == {"num_hidden_layers": 2, "new": {"a": 1}}
    assert config.logging.options == {"entity": "us"}


def test_later_words_win_and_experiments_yield_to_single_keys() -> None:
    config = load_config(["experiment=demo", "train.steps=50", "train.steps=60", "parallel=zero2"])
    assert config.train.steps == 60
    assert config.parallel.preset == "zero2"
    assert config.train.micro_batch_size == 4


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("zero_stage: lots", "parallel/mine.yaml: parallel.zero_stage=lots: must be a whole number"),
        ("zero_stag: 1", "parallel/mine.yaml: parallel.zero_stag: no such key; did you mean parallel.zero_stage?"),
        ("engine: tf", "parallel/mine.yaml: parallel.engine=tf: choose torch, deepspeed"),
        ("engine: [", "mine.yaml, line 2: not valid YAML: "),
    ],
)
def test_a_wrong_file_of_the_user_is_one_line(tmp_path: Path, body: str, problem: str) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel/mine.yaml").write_text(body + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["parallel=mine"], config_dir=str(tmp_path))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_user_adds_options(tmp_path: Path) -> None:
    for file, body in {
        "model/mine.yaml": "preset: mine\narchitecture: {model_type: llama, hidden_size: 64}\n",
        "experiment/first.yaml": "# @package _global_\ndefaults:\n  - override /model: mine\ntrain: {steps: 7}\n",
    }.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(body)
    config = load_config(["experiment=first"], config_dir=str(tmp_path))
    assert (config.model.preset, config.train.steps) == ("mine", 7)
    (tmp_path / "model/folder.yaml").mkdir()
    assert {"mine", "tiny", "folder"} & set(group_options(str(tmp_path))["model"]) == {"mine", "tiny"}
    assert chosen_options(["experiment=first"], config_dir=str(tmp_path))["model"] == "mine"
    with pytest.raises(ConfigError, match=r"^--config-dir=/nowhere: no such folder"):
        load_config(config_dir="/nowhere")


def test_a_sweep_is_every_combination() -> None:
    assert expand_sweep(["train.seed=1,2", "optimizer.lr=range(1,3)", "data.paths=[a,b]"]) == [
        ["train.seed=1", "optimizer.lr=1", "data.paths=[a,b]"],
        ["train.seed=1", "optimizer.lr=2", "data.paths=[a,b]"],
        ["train.seed=2", "optimizer.lr=1", "data.paths=[a,b]"],
        ["train.seed=2", "optimizer.lr=2", "data.paths=[a,b]"],
    ]
    assert expand_sweep(["scheduler=glob(*)"]) == [[f"scheduler={name}"] for name in group_options()["scheduler"]]
    with pytest.raises(ConfigError, match=r"^train\.seed=interval\(0,1\): "):
        expand_sweep(["train.seed=interval(0,1)"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.seed=range(1,1)"], "train.seed=range(1,1): stands for no value; write train.seed=1,2,3, or a range"),
        (["parallel=glob(nope*)"], "parallel=glob(nope*): stands for no value; "),
        (["train.seed=range(1,1000000000)"], "train.seed=range(1,1000000000): more than 1,000 runs; name fewer"),
        (["optimizer.lr=shuffle(range(0,1,1e-9))"], "optimizer.lr=shuffle(range(0,1,1e-9)): more than 1,000 runs; "),
        (["train.seed=range(0,40)", "train.steps=range(0,40)"], "train.seed=range(0,40) train.steps=range(0,40): more"),
        (["train.seed=range(1,nan)"], "train.seed=range(1,nan): no values of a sweep; write train.seed=1,2,3 or"),
        (["train.seed=range(1,2,0)"], "train.seed=range(1,2,0): no values of a sweep; "),
        (["train.seed=1,"], "train.seed=1,: no values of a sweep; "),
    ],
)
def test_values_that_make_no_sweep_are_one_line(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_sweep(words)
    (line,) = caught.value.problems
    assert line.startswith(problem)


@pytest.mark.parametrize(
    "text", ["runs/a", "a b", "it's", "a=b", "[x]", "1,2", "a\\", "a\\'b", "null", "true", "10", "é"]
)
def test_a_quoted_value_comes_back_as_it_was(text: str) -> None:
    assert load_config([f"train.run_dir={quote_value(text)}"]).train.run_dir == text


def test_yaml_that_was_not_written_here_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"^config.yaml: train\.steps=abc: must be a whole number$"):
        from_yaml("train: {steps: abc}")
    with pytest.raises(ConfigError, match=r"^config.yaml: train\.step: no such key; did you mean train\.steps\?"):
        from_yaml("train: {step: 3}")


def test_every_schema_attribute_has_a_type() -> None:
    """An attribute without an annotation is not a dataclass field and could not be set."""
    nodes = [node for file in CONFIGS.glob("schema*.py") for node in ast.parse(file.read_text()).body]
    sections = [node for node in nodes if isinstance(node, ast.ClassDef) and node.decorator_list]
    assert len(sections) >= 11
    assert not [node for section in sections for node in section.body if isinstance(node, ast.Assign)]


def attributes_read(source: str) -> set[str]:
    """Returns `section.field` for every attribute of a section that the source reads, also under another name.

    `schedule, peak = config.scheduler, config.optimizer.lr` makes `schedule.name` a use of scheduler.name, and
    `settings: Optimizer` makes `settings.lr` a use of optimizer.lr.
    """
    nodes = list(ast.walk(ast.parse(source)))
    sections = {
        alias.asname or alias.name: alias.name.lower()
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("configs.schema")
        for alias in node.names
    }
    given = [(node.arg, node.annotation) for node in nodes if isinstance(node, ast.arg)]
    known_as: dict[str, str] = {
        name: sections[kind.id] for name, kind in given if isinstance(kind, ast.Name) and kind.id in sections
    }
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            known_as |= {t.id: v.attr for t, v in pairs if isinstance(t, ast.Name) and isinstance(v, ast.Attribute)}
    read = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    owners = [(getattr(node.value, "attr", None) or getattr(node.value, "id", ""), node.attr) for node in read]
    return {f"{known_as.get(owner, owner)}.{name}" for owner, name in owners}


def test_every_key_is_read() -> None:
    """A key that only configs/ reads would be an option without effect."""
    files = [file for folder in ("trainer", "launch", "slurm") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) >= 40
    read = set().union(*(attributes_read(file.read_text()) for file in files))
    unread = [key for key in schema_keys() if not {".".join(f"config.{key}".split(".")[-2:]), kind_of(key)} & read]
    assert unread == []


def kind_of(key: str) -> str:
    """Returns the section's class and the key. The same code reads all sections of one class, whatever their names."""
    *path, leaf = key.split(".")
    kind: type = Config
    for name in path:
        kind = get_type_hints(kind)[name]
    return f"{kind.__name__.lower()}.{leaf}"
