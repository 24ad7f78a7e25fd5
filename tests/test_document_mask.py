"""With `data.document_mask`, a packed sample computes the same as its separate documents, under every layout."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import BloomConfig

from configs.errors import ConfigError
from configs.load import load_config
from launch.estimate import main as memory_estimate
from tests.support.cases import train
from tests.support.harness import run_ranks
from tests.support.parity import MODELS, distance, reference, words
from tests.support.selection import rows
from tests.test_data_chat import numbered, write_chats
from trainer.data import IGNORED
from trainer.data.samples import make_batch
from trainer.document_mask import NAME, check_document_mask, give_lengths
from trainer.model.build import build_hf_config, build_model
from trainer.model.filling import materialize
from trainer.model.loss import cross_entropy_sum
from trainer.model.weights import open_weights

END = 256
DOCUMENTS = [[5, 9, 17, END], [END], [40, 41, 42, 43, 44, 45, END], [7, 3, 250]]
LAYOUTS = {
    "ddp": (2, ()),
    "fsdp": (2, ()),
    "tensor": (2, ("parallel.sequence_parallel=true",)),
    "pipeline": (2, ()),
    "zero2": (2, ()),
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("packed")
    file = write_chats(folder / "chats.jsonl", [numbered(number) for number in range(60)])
    return (
        "data=chat",
        f"data.paths=[{file}]",
        f"data.cache_dir={folder}/cache",
        "data.seq_len=288",
        "data.packing=true",
        "data.ignore_fraction=0",
        "train.gradient_accumulation_steps=2",
    )


def test_positions_begin_again_and_borders_are_not_learnt() -> None:
    row = [token for document in DOCUMENTS for token in document]
    batch = make_batch(torch.tensor([row]).numpy(), end=END)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6, 0, 1]]
    assert batch.labels.tolist() == [
        [9, 17, END, IGNORED, IGNORED, 41, 42, 43, 44, 45, END, IGNORED, 3, 250],
    ]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_sample_is_its_documents(name: str, attention: str) -> None:
    config = load_config([*MODELS[name], f"model.attention={attention}"])
    model = build_model(config.model, build_hf_config(config.model))
    weights = open_weights(config.model, model, seed=0)(model)
    materialize(model, weights, device=torch.device("cpu"), dtype=torch.float64)
    model.eval()
    row = torch.tensor([[token for document in DOCUMENTS for token in document]])
    packed = make_batch(row.numpy(), end=END)
    logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
    together = cross_entropy_sum(logits, packed.labels)
    alone = sum(
        cross_entropy_sum(
            model(input_ids=torch.tensor([document]), use_cache=False).logits[:, :-1], torch.tensor([document[1:]])
        )
        for document in DOCUMENTS
        if len(document) > 1
    )
    assert abs(together.item() / float(alone) - 1) < 1e-6
    unmasked = cross_entropy_sum(model(input_ids=packed.input_ids, use_cache=False).logits, packed.labels)
    assert abs(unmasked.item() / float(alone) - 1) > 1e-4, "the documents do not touch each other: nothing was tested"


@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_the_mask(name: str) -> None:
    """A kernel that gets lengths computes the same forward and backward as a mask, for two rows at once."""
    config = load_config([*MODELS[name], "model.attention=sdpa"])
    model = build_model(config.model, build_hf_config(config.model))
    weights = open_weights(config.model, model, seed=0)(model)
    materialize(model, weights, device=torch.device("cpu"), dtype=torch.float64)
    model.eval()
    row = [token for document in DOCUMENTS for token in document]
    packed = make_batch(torch.tensor([row, row[7:] + row[:7]]).numpy(), end=END)
    found = []
    for lengths in (False, True):
        if lengths:
            check_document_mask(model.config, lengths=True)
            model.set_attn_implementation(NAME)
            give_lengths(model)
            model = copy.deepcopy(model)  # pipeline stages are made this way
        logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
        loss = cross_entropy_sum(logits, packed.labels)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for masked, by_length in zip(*found, strict=True):
        assert (masked is None) is (by_length is None)
        assert masked is None or (masked - by_length).abs().max() <= 1e-6 * masked.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("layout", rows(zip(LAYOUTS), lambda layout: layout != "fsdp"))
def test_layout_keeps_documents_apart_as_one_process_does(layout: str, chats: tuple[str, ...]) -> None:
    world_size, keys = LAYOUTS[layout]
    precision, tolerance = ("fp32", 1e-5) if layout.startswith("zero") else ("fp64", 1e-10)
    expected = reference("llama", precision, 3, *chats, "data.document_mask=true")
    mask = ("data.document_mask=true", *keys)
    found = run_ranks(world_size, train, words("llama", layout, precision, 3, *chats, *mask))[0]
    assert distance(found, expected).largest <= tolerance


def test_the_mask_changes_what_is_trained(chats: tuple[str, ...]) -> None:
    kept_apart = reference("llama", "fp64", 3, *chats, "data.document_mask=true")
    assert distance(reference("llama", "fp64", 3, *chats), kept_apart).loss > 1e-4


def test_an_architecture_that_cannot_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.document_mask=true: a bloom sees across the border"):
        check_document_mask(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(ConfigError, match=r"a bloom sees across .* whatever their lengths say; use model.att"):
        check_document_mask(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), lengths=True)


def test_lengths_take_no_memory_of_a_mask(capsys: pytest.CaptureFixture[str]) -> None:
    """The estimate counts the seq_len x seq_len values of a mask only where a mask is built."""
    long = ["model=tiny", "data.seq_len=2048", "model.config.max_position_embeddings=2048", "precision=bf16"]
    keys = [*long, "train.micro_batch_size=2", "cluster=8xh100", "cluster.gpus_per_node=1", "estimate.format=json"]
    peaks = []
    for more in ("", "model.attention=flash_attention_2", "model.attention=sdpa"):
        mask = [more, "data.document_mask=true"] if more else []
        memory_estimate([*keys, *mask])
        (rank, *_) = json.loads(capsys.readouterr().out)["ranks"]
        peaks.append(rank["peak_allocated_bytes"])
    plain, by_length, by_mask = peaks
    assert by_length - plain < 2**20
    assert by_mask - plain >= 2 * 2048**2
