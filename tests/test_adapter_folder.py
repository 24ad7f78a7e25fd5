"""An adapter folder is resumed with its recorded settings, merged into its base model, and read as peft reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.adapter_folder import CONFIG, TENSORS
from configs.errors import ConfigError, CookbookError
from configs.load import load_config
from tests.support.cases import run_trainer
from tests.support.harness import run_ranks
from tests.support.selection import rows
from trainer.checkpoint.__main__ import main
from trainer.passes import prepare_model

COMMON = ["data.seq_len=32", "train.global_batch_size=4", "logging.progress=lines", "precision=fp32"]
COMMON += ["data=synthetic", "train.eval_samples=2", "model.weights=pretrained", "data.tokenizer=bytes"]
EXACT = 2e-6
# peft 0.21 reads a transformers attribute by its deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def run(*words: str) -> list[float]:
    """The validation losses of a run, before its first step and after its last one."""
    assert run_ranks(1, run_trainer, [*COMMON, *words]) == [0]
    folder = next(Path(word.partition("=")[2]) for word in words if word.startswith("train.run_dir="))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with large weights, so its loss differs from that of a uniform guess."""
    folder = tmp_path_factory.mktemp("base")
    config = load_config(["model=tiny", "model.config.hidden_size=64", "model.config.vocab_size=261"])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(prepare_model(config).config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder)
    return folder


VARIANTS = {
    "pissa": ["tuning.init=pissa", "tuning.rslora=true", "tuning.layers=[1]", "tuning.modules_to_save=[norm]"],
    "dora": ["tuning.init=olora", "tuning.dora=true", "tuning.target_modules=[all-linear]"],
}


@pytest.mark.parametrize("variant", rows([(variant,) for variant in VARIANTS], lambda variant: variant == "pissa"))
def test_a_folder_goes_on_merges_and_is_peft_s(variant: str, base: Path, tmp_path: Path) -> None:
    words = ["tuning=lora", "tuning.rank=4", "optimizer.lr=0.03", *VARIANTS[variant]]
    before, after = run(f"model.path={base}", *words, "train.steps=3", f"train.run_dir={tmp_path / 'run'}")
    assert abs(after - before) > 0.05
    folder = tmp_path / "run" / "model"
    gone_on = run(f"model.path={folder}", "tuning=lora", "train.steps=1", f"train.run_dir={tmp_path / 'more'}")
    assert gone_on[0] == pytest.approx(after, rel=EXACT)
    # peft does the merging, so this shows that peft loads the trained weights.
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "whole")]) == 0
    whole = run(f"model.path={tmp_path / 'whole'}", "train.steps=1", f"train.run_dir={tmp_path / 'full'}")
    assert whole[0] == pytest.approx(after, rel=EXACT)
    described = json.loads((folder / CONFIG).read_text())
    assert (described["r"], described["use_dora"]) == (4, variant == "dora")
    assert load_file(tmp_path / "more" / "model" / TENSORS).keys() == load_file(folder / TENSORS).keys()


def peft_s(base: Path, folder: Path, **settings: Any) -> PreTrainedModel:
    """Writes a peft adapter whose tensors all differ from their initial values. Returns its base model."""
    torch.manual_seed(2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 20)
    model.save_pretrained(str(folder))
    return AutoModelForCausalLM.from_pretrained(base)


def test_what_peft_has_written_is_gone_on_from_under_any_layout(base: Path, tmp_path: Path) -> None:
    """`target_modules` is a regular expression that also picks the layers. The loss equals that of peft's own merge."""
    kind = {"target_modules": r".*\.1\..*\.(q_proj|down_proj)", "r": 3, "lora_alpha": 12}
    plain = peft_s(base, tmp_path / "a", **kind, use_rslora=True, modules_to_save=["lm_head"], lora_dropout=0.1)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "a")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = run(f"model.path={tmp_path / 'merged'}", "train.steps=1", f"train.run_dir={tmp_path / 'full'}")[0]
    words = [f"model.path={tmp_path / 'a'}", "tuning=lora", "tuning.dropout=0", "train.steps=1"]
    config = load_config([*COMMON, *words])
    assert (config.model.path, config.tuning.adapter) == (str(base), str(tmp_path / "a"))
    assert (config.tuning.rank, config.tuning.alpha, config.tuning.layers) == (3, 12, [1])
    assert (config.tuning.dropout, config.tuning.modules_to_save) == (0, ["lm_head"])
    out = [*COMMON, *words, f"train.run_dir={tmp_path / 'divided'}", "parallel=tensor"]
    assert run_ranks(2, run_trainer, out) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "divided" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    peft_s(base, folder, target_modules=["q_proj"], r=4)
    return folder


def said(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


REFUSED: dict[str, tuple[Callable[[Path], Any] | None, list[str], str]] = {
    "rank": (None, ["tuning.rank=16"], "tuning.rank=16: the adapter of model.path=F has 4; leave the key out"),
    "layers": (None, ["tuning.layers=[0]"], "tuning.layers=[0]: the adapter of model.path=F has [0, 1, 2, 3]; leave"),
    "full": (None, ["tuning=full"], "tuning=full: model.path=F holds an adapter; set tuning=lora to go on from it, or"),
    "random": (
        None,
        ["model.weights=random"],
        "model.weights=random: model.path=F holds an adapter, which means nothi",
    ),
    "pattern": (said(rank_pattern={"q": 2}), [], "model.path=F: adapter_config.json has rank_pattern={'q': 2}, which"),
    "start": (said(init_lora_weights="corda"), [], "model.path=F: adapter_config.json has init_lora_weights=corda, wh"),
    "kind": (said(peft_type="LOHA"), [], "model.path=F: holds an adapter of kind LOHA, from which no run goes on; beg"),
    "base": (said(base_model_name_or_path="/no/b"), [], "model.path=F: was trained upon /no/b, which is not here; set"),
    "no base": (said(base_model_name_or_path=None), [], "model.path=F: does not name the model that it was trained up"),
    "JSON": (lambda f: (f / CONFIG).write_text("["), [], "model.path=F: adapter_config.json is no JSON object ("),
    "cut": (
        lambda f: (f / TENSORS).write_bytes(b"\1\0\0\0\0\0\0\0{"),
        [],
        "model.path=F: adapter_model.safetensors is",
    ),
    "tensors": (
        lambda f: (f / TENSORS).unlink(),
        [],
        "model.path=F: adapter_model.safetensors cannot be read (No such",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_folder_cannot_be_is_one_line(case: str, adapter: Path, tmp_path: Path) -> None:
    change, words, says = REFUSED[case]
    folder = tmp_path / "F"
    shutil.copytree(adapter, folder)
    if change is not None:
        change(folder)
    with pytest.raises(CookbookError) as refused:
        load_config([*COMMON, f"model.path={folder}", "tuning=lora", *words])
    (line,) = refused.value.problems
    assert line.replace(str(folder), "F").startswith(says)


def test_tensors_that_are_not_the_model_s_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "F"
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / TENSORS)
    first = min(tensors)
    tensors[first] = torch.zeros(4, 7)
    save_file(tensors, folder / TENSORS)
    config = load_config([*COMMON, f"model.path={base}", f"tuning.adapter={folder}", "tuning=lora"])
    with pytest.raises(CookbookError) as refused:
        prepare_model(config)
    shape, remedy = refused.value.problems
    assert shape.startswith(f"tuning.adapter={folder}: {first} has the shape [4, 7], in the model it is [4, 64]")
    assert remedy.endswith("give the base of this adapter as model.path")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tuning.modules_to_save=[nosuch]"], "nosuch matches no module of LlamaForCausalLM that has parameters"),
        (["tuning.modules_to_save=[q_proj]"], "q_proj is to be trained whole, and model.layers."),
        (["model=tiny_gpt2", "tuning.modules_to_save=[lm_head]"], "lm_head is tied ("),
        (["tuning.layers=[1,4]"], "tuning.layers=[1, 4]: 4 is no layer of the model, which has 0 to 3"),
        (["tuning=qlora", "tuning.modules_to_save=[o_proj]", "tuning.target_modules=[q_proj]"], "o_proj is kept in 4 "),
        (
            ["model.config.model_type=mixtral", "tuning.target_modules=[down_proj]", "tuning.dora=true"],
            "is no linear layer, and tuning.dora is for linear layers",
        ),
    ],
)
def test_what_a_model_cannot_give_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_model(load_config(["model=tiny", "tuning=lora", *words]))
    (line,) = refused.value.problems
    assert says in line


def test_the_entry_point_says_what_cannot_be_merged(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        assert main(["merge", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert f"{base}: exists" in refused(adapter, base)
    assert "is an adapter too; merge it into its own model first" in refused(adapter, tmp_path / "o", "--base", adapter)
    assert "cannot be merged into" in refused(adapter, tmp_path / "o", "--base", tmp_path)
    assert "is no checkpoint and holds none" in refused(tmp_path, tmp_path / "o")


@pytest.mark.parametrize("key", ["model.path", "tuning.adapter"])
def test_one_of_several_adapters_is_named(key: str, tmp_path: Path) -> None:
    for name in ("english", "french"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text("{}")
    with pytest.raises(ConfigError) as refused:
        load_config(["model=tiny", "tuning=lora", f"{key}={tmp_path}"])
    (line,) = refused.value.problems
    given = f"{key}={tmp_path}"
    assert line == f"{given}: holds adapters of its own (english, french); give one of them, {given}/english"
