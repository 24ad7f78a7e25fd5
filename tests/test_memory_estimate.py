"""The command `memory-estimate`: its answers, exit codes and formats."""

from __future__ import annotations

import csv
import gc
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import configs
from configs.choices import Checkpointing
from configs.load import load_config
from launch.estimate import main
from tests.support.browser import browser
from tests.support.estimate_cases import answer_json
from tests.support.selection import rows
from tests.test_memory_measured import CASES
from trainer.axes import TENSOR
from trainer.axes.tensor.vocabulary import WIDE_ELEMENTS
from trainer.estimate.estimate import GIB, estimate, planned_machine
from trainer.estimate.gate import DoesNotFit, check_memory
from trainer.estimate.trace import FROZEN_BY_PYTHON
from trainer.estimate.tracing import NotEstimated
from trainer.estimate.verdict import ABOVE, Verdict
from trainer.make_plan import make_plan
from trainer.model.build import held_layers
from trainer.plan.machine import Machine
from trainer.plan.model_fields import config_fields
from trainer.recompute import apply_checkpointing

ALONE = ["estimate.suggest=false"]  # test_memory_suggest covers suggestions and the largest micro-batch
UNMEASURED = {
    "parallel=zero3_nvme": "follows DeepSpeed's code and settings",
    "parallel=fsdp_offload": "tensors of host and device are distinguished on GPUs only",
}
BIG = ["model=llama3_1_405b", "precision=bf16", "data.seq_len=4096", "train.micro_batch_size=1"]


def test_json_totals_agree(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = answer_json(
        ["model=gpt2", "parallel=ddp", "cluster=8xl4", "train.micro_batch_size=1", *ALONE, cache], capsys
    )
    ranks = found["ranks"]
    assert isinstance(ranks, list)
    (rank,) = ranks
    assert rank["count"] == 8 and rank["kind"] == found["busiest"]
    assert sum(rank["components"].values()) == rank["peak_allocated_bytes"] == found["peak_allocated_bytes"]
    assert rank["peak_allocated_bytes"] <= rank["peak_reserved_bytes"] < rank["device_bytes"]
    assert rank["device_most_bytes"] == int(rank["device_bytes"] * ABOVE[True])
    outside = rank["device_bytes"] - rank["peak_reserved_bytes"]
    assert rank["device_most_bytes"] - rank["peak_reserved_most_bytes"] == outside
    assert found["verdict"] == rank["verdict"] == "fits"


def test_a_component_shows_its_own_maximum(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At the peak, in the loss, FSDP holds no gradients. The output must show that they take memory at other times."""
    words = ["model=gpt2", "parallel=fsdp", "cluster=8xh100", "precision=bf16", "train.chunked_loss=false", cache]
    words += ALONE
    _, found = answer_json(words, capsys)
    ranks = found["ranks"]
    assert isinstance(ranks, list)
    at_peak, highest = ranks[0]["components"], ranks[0]["highest"]
    assert at_peak["gradients_bytes"] == 0 < highest["gradients_bytes"]
    assert all(highest[name] >= size for name, size in at_peak.items())
    main(words)
    shown = capsys.readouterr().out
    assert re.search(r"^gradients +0\.00 \(0\.\d\d\)$", shown, re.MULTILINE)
    assert "in parentheses: what the component holds at its own highest moment" in shown


@pytest.mark.parametrize("expandable", [True, False])
def test_the_verdict_is_said_of_the_range(expandable: bool, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=gpt2", "parallel=ddp", "cluster=8xl4", "train.micro_batch_size=1", "estimate.suggest=false", cache]
    words.append(f"cluster.expandable_segments={str(expandable).lower()}")
    _, found = answer_json(words, capsys)
    lower = found["device_bytes"]
    assert isinstance(lower, int) and found["device_most_bytes"] == int(lower * ABOVE[expandable])
    for size, code, verdict in ((0.99, 3, "does not fit"), (1.01, 0, "tight"), (1.01 * ABOVE[expandable], 0, "fits")):
        assert main([*words, f"cluster.gpu_memory_gib={lower * size / GIB}"]) == code
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{verdict}: ")


def test_405b_on_16384_gpus_from_the_cache_takes_seconds(cache: str) -> None:
    words = [*BIG, "parallel=fsdp", "cluster=8xh100", "cluster.nodes=2048", cache, "estimate.suggest=false"]
    words.append("train.activation_checkpointing=full")
    config = load_config(words)
    plan = make_plan(config, planned_machine(config, Machine()))
    assert estimate(config, plan).ranks[0].count == 16384
    started = time.perf_counter()
    estimate(config, plan)
    # It takes a second on an idle machine; the bound allows for other tests on the same cores.
    assert time.perf_counter() - started < 10


def test_static_bytes_follow_from_shapes(cache: str) -> None:
    config = load_config(["model=tiny", "parallel=single", "cluster.device=cpu", cache])
    plan = make_plan(config, Machine())
    found = estimate(config, plan)
    numel = found.profile.anatomy.numel
    assert found.verdict is Verdict.unknown
    # float32 AdamW keeps the parameter, two moments and a 4-byte step counter per tensor; the model adds rotary tables.
    tensors = len(list(found.profile.anatomy.parameters()))
    assert found.busiest.between_steps_bytes == numel * 12 + tensors * 4 + found.profile.anatomy.buffers_bytes


def test_sweep_is_a_table_and_csv(cache: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "sweep.html"
    words = ["-m", "parallel=ddp,zero2,fsdp", "model=gpt2", "precision=bf16", "cluster=8xh100", cache]
    assert main([*words, "train.micro_batch_size=1", f"estimate.plot={picture}"]) == 0
    common, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert common == f"all with model=gpt2 precision=bf16 cluster=8xh100 {cache} train.micro_batch_size=1"
    assert [line.split("  ")[0] for line in lines] == ["parallel=ddp", "parallel=zero2", "parallel=fsdp"]
    assert "<svg" in picture.read_text()
    drawn = picture.read_text()
    assert "model=gpt2" not in "".join(re.findall(r"<rect[^>]*><title>.*?</title>", drawn)), "in every bar's label"
    assert ">Peak of one GPU: model=gpt2 precision=bf16 cluster=8xh100" in drawn and "CUDA context, NCCL" in drawn
    assert main([*words, "train.micro_batch_size=1", "estimate.format=csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 3 and all(int(row["device_bytes"]) > 0 for row in rows)


def test_explained_and_drawn(cache: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "step.html"
    words = ["model=tiny", "parallel=fsdp", "cluster=8xl4", cache, "estimate.explain=true", f"estimate.plot={picture}"]
    words += ALONE
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "how it was counted" in out and "804,992 parameters" in out
    drawn = picture.read_text()
    assert "optimizer step, step 2" in drawn or "loss, step 2" in drawn
    assert ">Two steps of one GPU: model=tiny parallel=fsdp cluster=8xl4</h1>" in drawn
    assert re.findall(r">([\d.]+ GiB)</text>", drawn) == ["0 GiB", "5 GiB", "10 GiB", "15 GiB", "20 GiB"]
    assert all(f">{text}" in drawn for text in ("reserved by torch: ", "with context and NCCL: ", "L4: 22.0 GiB"))


def test_a_phone_shows_a_drawn_step(cache: str, tmp_path: Path) -> None:
    file = tmp_path / "step.html"
    with browser(tmp_path / "browser") as opened:
        assert main(["model=tiny", "parallel=fsdp", "cluster=8xl4", cache, f"estimate.plot={file}", *ALONE]) == 0
        opened.show(width=360, height=740)
        opened.open(file)
        assert opened.complaints() == [] and opened.wrong == []


# Model -> its active and total parameters, and its routing. The command is read from the head of the model's file.
MIXTURES = {
    "deepseek_v3": ("37,552,282,624 of 671,026,404,352", "8 of 256 experts in each of 58 layers"),
    "glm_4_5_air": ("13,424,123,904 of 106,852,245,504", "8 of 128 experts in each of 45 layers"),
    "gpt_oss_120b": ("5,711,982,912 of 116,829,156,672", "4 of 128 experts in each of 36 layers"),
    "gpt_oss_20b": ("4,187,440,704 of 20,914,757,184", "4 of 32 experts in each of 24 layers"),
    "mixtral_8x7b": ("12,879,925,248 of 46,702,792,704", "2 of 8 experts in each of 32 layers"),
    "qwen3_235b_a22b": ("22,190,763,520 of 235,093,634,560", "8 of 128 experts in each of 94 layers"),
    "qwen3_30b_a3b": ("3,353,032,704 of 30,532,122,624", "8 of 128 experts in each of 48 layers"),
}


@pytest.mark.parametrize("model", rows(((name,) for name in MIXTURES), lambda name: name == "mixtral_8x7b"))
def test_a_published_mixture_of_experts_fits_where_its_file_says(
    model: str, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(configs.__file__).parent / "model" / f"{model}.yaml").read_text()
    (words,) = re.findall(r"python -m launch (.*)", text)
    active, where = MIXTURES[model]
    asked = [*words.split(), "cluster=8xh100", *_nodes(words), cache, "estimate.explain=true", *ALONE]
    _, found = answer_json(asked, capsys)
    assert [f"{found[key]:,}" for key in ("active_parameters", "parameters")] == active.split(" of ")
    assert found["fits"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert f"experts    {active} parameters are active for a token: {where}\n" in out
    assert f"of them are active for a token: {where}\n" in out.partition("how it was counted")[2]


def _nodes(words: str) -> list[str]:
    """Returns the override of the number of nodes. The cluster's file sets it too, so it must be repeated."""
    return [word for word in words.split() if word.startswith("cluster.nodes=")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "parallel=zero3 tuning=lora tuning.rank=1",
            ["T = 9,344 of them", "F = 804,992", "2 B x F / 8", "4 B x T / 8"],
        ),
        ("parallel=zero1 tuning=lora tuning.rank=1", ["2 B x F = 0.00", "parameters 2 B x T;"]),
        ("parallel=fsdp tuning=qlora", ["Q = 557,056 in 4 bits: codes 0.5 B x Q / 8", "scales, whole on every rank"]),
        ("parallel=ddp tuning=lora", ["2 B x F = 0.00", "gradients 4 B x T ="]),
    ],
)
def test_what_is_frozen_is_explained_apart(
    words: str, said: list[str], cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["model=tiny", "precision=bf16", "cluster=8xl4", cache, "estimate.explain=true", *ALONE]
    assert main([*common, *words.split()]) == 0
    out = capsys.readouterr().out
    assert all(each in out for each in said), out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.gpu=H900"], "H100-SXM"),
        (["model.config.hiden_size=3"], "hiden_size"),
        (["cluster.gpu_memory_gib=0"], "cluster.gpu_memory_gib"),
        (["estimate.plot=x.bmp", "model=tiny"], "estimate.plot=x.bmp"),
    ],
)
def test_mistakes_and_what_is_not_counted_cost_a_line(
    words: list[str], said: str, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, cache]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_code_that_needs_values_is_refused_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaMLP.forward

    def scaled_by_the_first_token(mlp: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
        return plain(mlp, hidden) * hidden[:, :1].max().item()

    monkeypatch.setattr(LlamaMLP, "forward", scaled_by_the_first_token)
    config = load_config(["model=tiny", "parallel=single", f"data.cache_dir={tmp_path}"])
    with pytest.raises(NotEstimated, match="not estimated") as refused:
        estimate(config, make_plan(config, Machine(gpus=1)))
    assert gc.get_freeze_count() <= FROZEN_BY_PYTHON, "a trace that fails leaves the collector as it was"
    (line,) = refused.value.problems
    # The lower bound is 16 bytes for each of 804,992 parameters. The upper bound adds 8 bytes for each parameter and
    # the maximum activations of 8 sequences of 256 tokens.
    assert "more than 0.01 GiB, for the states of its 804,992 parameters, and less than 0.42 GiB" in line
    config = load_config(["model=llama3_2_1b", "precision=bf16", "tuning=lora", f"data.cache_dir={tmp_path}"])
    with pytest.raises(NotEstimated, match=r"of its 11,272,192 parameters that are trained, and 2\.30 GiB") as refused:
        estimate(config, make_plan(config, Machine(gpus=1)))
    # The frozen model takes 2 bytes for each of 1,235,814,400 parameters; each trained parameter takes 16 bytes.
    assert "more than 2.47 GiB" in str(refused.value)


def test_what_goes_to_disk_and_what_waits_in_host_memory(cache: str) -> None:
    """Two ranks have one sub-group of matrices and one of vectors. A sub-group has at least 2**20 / 4 elements."""
    words = ["model=tiny", "parallel=zero3_nvme", "precision=bf16", "parallel.offload.nvme_path=/nvme", "cluster=8xl4"]
    config = load_config([*words, "cluster.gpus_per_node=2", "data.seq_len=32", cache])
    found = estimate(config, make_plan(config, Machine(gpus=2)))
    parameters = list(found.profile.anatomy.parameters())
    share = sum(-(-p.numel // 2) for p in parameters)
    matrices = sum(p.numel for p in parameters if len(p.shape) > 1)
    # The terms are bfloat16 parameters and, in float32, master weights, two moments and the gradient of the update.
    assert found.busiest.nvme_bytes == share * (2 + 4 + 2 * 4 + 4)
    largest = max(p.numel for p in parameters) // 2
    buffers = 6 * -(-largest // 2**19) * 2**19 * 2
    assert found.busiest.host_bytes == share * 4 + 4 * (matrices // 2) * 4 + buffers + matrices * 2


def test_gate_refuses_warns_or_looks_away(cache: str, tmp_path: Path) -> None:
    words = ["model=tiny", "parallel=single", "cluster.gpu=L4", "cluster.device=cuda", "data.seq_len=1024", cache]
    words += ["train.micro_batch_size=16", "train.chunked_loss=false"]
    config = load_config(words)
    plan = make_plan(config, Machine(gpus=1))
    (line,) = check_memory(config, plan, driver=tmp_path)
    assert line.endswith("L4 has 22.0: fits")
    (total,) = {rank.device_bytes for rank in estimate(config, plan).ranks}
    below, between = ([*words, f"cluster.gpu_memory_gib={share * total / GIB}"] for share in (0.95, 1.05))
    with pytest.raises(DoesNotFit, match=r": does not fit\n +\d[^\n]* GiB with ") as refused:
        check_memory(load_config(below), plan, driver=tmp_path)
    assert refused.value.exit_code == 3
    warned = load_config([*below, "estimate.gate=warn"])
    assert "does not fit" in check_memory(warned, plan, driver=tmp_path)[0]
    (line,) = check_memory(load_config(between), plan, driver=tmp_path)
    assert ": tight; what the allocator keeps aside may be too much (estimate.gate=strict refuses such a start)" in line
    strict = load_config([*between, "estimate.gate=strict"])
    with pytest.raises(DoesNotFit, match=r"estimate\.gate=refuse starts what is tight"):
        check_memory(strict, plan, driver=tmp_path)
    assert check_memory(load_config([*below, "estimate.gate=off"]), plan, driver=tmp_path) == []


def test_a_gate_that_could_not_estimate_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library lacks a function that the estimator uses. The run may start and reports that nothing was checked."""
    monkeypatch.delattr("transformers.integrations.moe._can_use_grouped_mm")
    words = ["model=tiny", "parallel=single", "cluster.device=cuda", f"data.cache_dir={tmp_path}"]
    config = load_config(words)
    (line,) = check_memory(config, make_plan(config, Machine(gpus=1)), driver=tmp_path)
    assert line.startswith("memory     not estimated, so nothing says whether this fits: AttributeError: ")


def test_a_folder_that_holds_a_config_alone_is_estimated(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights on synthetic data need no weight files and no tokenizer for the estimate."""
    (tmp_path / "config.json").write_text(json.dumps(dict(load_config(["model=tiny"]).model.architecture)))
    words = [f"model.path={tmp_path}", "data=synthetic", "parallel=ddp", "cluster=8xh100", "estimate.suggest=false"]
    assert main([*words, cache]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("then", ["train.micro_batch_size=1", "train.micro_batch_size=2"])
def test_answer_from_earlier_traces_needs_no_torch(cache: str, then: str) -> None:
    """The suggestions of the first answer trace the sizes from which those of other micro-batches follow."""
    words = ["model=tiny", "parallel=fsdp", "precision=bf16", "cluster=8xh100", "data=synthetic", "data.seq_len=512"]
    assert main([*words, cache, "train.micro_batch_size=1"]) == 0
    asked = [*words, cache, then]
    code = f"import sys; from launch.estimate import main; main({asked!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_estimate_follows_the_segments_of_the_run(cache: str) -> None:
    words = ["model=llama3_2_1b", "parallel=fsdp", "cluster=8xh100", "precision=bf16", cache]
    ranks = {}
    for expandable in (True, False):
        config = load_config([*words, f"cluster.expandable_segments={str(expandable).lower()}"])
        ranks[expandable] = estimate(config, make_plan(config, Machine(gpus=8))).busiest
    grown, fixed = ranks[True], ranks[False]
    assert grown.peak_allocated_bytes <= fixed.peak_allocated_bytes
    assert grown.peak_allocated_bytes <= grown.peak_reserved_bytes != fixed.peak_reserved_bytes


def test_every_layout_is_measured_or_refused(cache: str) -> None:
    measured = {word for _, _, words in CASES.values() for word in words if word.startswith("parallel=")}
    presets = {f"parallel={file.stem}" for file in (Path(configs.__file__).parent / "parallel").glob("*.yaml")}
    for preset in presets - measured - UNMEASURED.keys():
        config = load_config(["model=tiny", "precision=bf16", preset, cache])
        with pytest.raises(NotEstimated, match="memory is not estimated"):
            estimate(config, make_plan(config, Machine(gpus=8)))


@pytest.mark.parametrize("layout", ["pipeline", "tensor_fsdp"])
def test_the_loss_keeps_the_logits_and_their_gradient_and_no_more(layout: str, cache: str) -> None:
    """4 bytes per token and word in bfloat16, and one slice of logits in float32."""
    tokens, words, gpus = 2048, 131072, {"pipeline": 2, "tensor_fsdp": 4}[layout]
    keys = ["model=tiny", f"model.config.vocab_size={words}", f"data.seq_len={tokens}", "train.micro_batch_size=1"]
    keys += [f"parallel={layout}", "precision=bf16", "cluster=8xh100", f"cluster.gpus_per_node={gpus}", cache]
    config = load_config(keys)
    plan = make_plan(config, Machine(gpus=gpus))
    logits = 4 * tokens * words // plan.degree(TENSOR)
    loss = max(rank.highest["loss"] for rank in estimate(config, plan).ranks)
    assert logits <= loss < logits + 1.1 * WIDE_ELEMENTS * 4


def test_ranks_of_a_pipeline_are_named(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_2_1b", "parallel=3d_zero1", "cluster=8xh100", "train.gradient_accumulation_steps=8", cache]
    words += ["parallel.pp=4", "precision=bf16", *ALONE]
    _, found = answer_json(words, capsys)
    ranks = found["ranks"]
    assert isinstance(ranks, list)
    assert [(rank["kind"], rank["count"]) for rank in ranks] == [("pp0", 2), ("pp1", 2), ("pp2", 2), ("pp3", 2)]
    # The last stage holds the logits of one micro-batch; the first stage holds the hidden states of four.
    assert found["busiest"] == max(ranks, key=lambda rank: rank["device_bytes"])["kind"]
    assert len({rank["peak_allocated_bytes"] for rank in ranks}) == 4
    assert main(words) == 0
    assert f"2 x {found['busiest']} (busiest)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "schedule",
    rows(
        zip(("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")),
        lambda schedule: schedule in ("1f1b", "interleaved_zero_bubble"),
    ),
)
def test_places_left_out_are_not_the_busiest(schedule: str, cache: str) -> None:
    words = ["model=llama3_2_1b", "cluster=8xh100", "precision=bf16", cache, "parallel=pipeline", "parallel.pp=8"]
    words += ["train.gradient_accumulation_steps=16", f"parallel.pipeline.schedule={schedule}"]
    config = load_config(words)
    plan = make_plan(config, Machine(gpus=8))
    every, some = estimate(config, plan), estimate(config, plan, heaviest=True)
    assert len(every.ranks) == 8 and (len(some.ranks) < 8 or "zero_bubble" in schedule)
    assert all(rank in every.ranks for rank in some.ranks)
    assert some.busiest == every.busiest


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # raised by torch.compile
@pytest.mark.parametrize(("recompute", "share"), [("none", 0.8), ("selective", 1.0)])
def test_a_compiled_layer_keeps_what_its_graph_hands_to_the_backward(recompute: str, share: float, cache: str) -> None:
    """Compares one additional layer in the estimate with the tensors that a compiled layer saves for the backward. The
    layer is compiled without code generation."""
    words = [
        "model=tiny",
        "parallel=single",
        "cluster.device=cpu",
        "data.seq_len=64",
        "train.micro_batch_size=2",
        f"train.activation_checkpointing={recompute}",
        cache,
    ]
    held = {}
    for compiled, layers in itertools.product((True, False), (4, 5)):
        more = [f"train.compile={str(compiled).lower()}", f"model.config.num_hidden_layers={layers}"]
        config = load_config([*words, *more])
        held[compiled, layers] = estimate(config, make_plan(config, Machine())).busiest.highest["activations"]
    kept = {compiled: held[compiled, 5] - held[compiled, 4] for compiled in (True, False)}

    config = LlamaConfig.from_dict({**config_fields(load_config(words)), "attn_implementation": "sdpa"})
    model, found = LlamaForCausalLM(config), dict[int, int]()
    apply_checkpointing(model, Checkpointing(recompute))
    layer = held_layers(model)[0]
    heads = config.hidden_size // config.num_attention_heads
    angles = torch.zeros(1, 64, heads)
    given = {x.data_ptr() for x in (*layer.parameters(), angles)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in given:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.zeros(2, 64, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run = torch.compile(layer.forward, backend="aot_eager_decomp_partition", fullgraph=True)
        run(hidden, position_embeddings=(angles, angles))
    assert kept[True] == sum(found.values()) <= share * kept[False]
