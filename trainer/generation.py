"""Text generation with a trained model: transformers' own `generate`, on one device, from any folder with the model.

a run             the model that it exported, or else its newest whole checkpoint
a checkpoint      exported into a temporary folder first
a model           as transformers reads it
an adapter        with its base model, by peft or by the kind of layer that peft does not have
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from configs.errors import ConfigError, CookbookError, EnvironmentProblem, first_line
from configs.load import from_yaml
from trainer import linear
from trainer.checkpoint.export import export
from trainer.data.tokenizer import tokenizer_to_export
from trainer.model.causal import build_causal
from trainer.model.custom import introduce_of_run
from trainer.model.filling import materialize
from trainer.model.weights import open_weights
from trainer.plan.model_fields import sizes

CONFIG, ADAPTER = "config.json", "adapter_config.json"


CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters: an untrained model produces any byte, and a terminal obeys some of them."""


class Printer(TextStreamer):
    """Prints text as soon as it is final, without characters that a terminal would treat as commands."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text.translate(CONTROLS), end="\n" if stream_end else "", flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """source: folder.
    prompt: text to continue, or a user's message if `chat` is set.
    tokens: maximum number of tokens.
    temperature: 0 takes the most likely token.
    initial: use the weights that the run began with.
    base: base model of an adapter.
    device: None for a GPU if there is one."""

    source: Path
    prompt: str = ""
    tokens: int = 200
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    initial: bool = False
    base: str | None = None
    device: str | None = None


def write(asked: Request) -> None:
    """Print the text as it is generated. Raises CookbookError for an unusable folder or device."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _model_folder(asked) as folder:
        device = _device(asked.device)
        model, tokenizer = _load(folder, asked, device)
    ids = _encoded(tokenizer, asked, device)
    room = _room(model, ids.shape[1], asked)
    sampling: dict[str, Any] = {"do_sample": False}
    if asked.temperature > 0:
        sampling = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    torch.manual_seed(asked.seed)
    writer: Any = model
    with warnings.catch_warnings():
        # peft numbers the positions after virtual tokens itself, and warns at each token.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        writer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(asked.tokens, room),
            streamer=Printer(tokenizer, skip_prompt=asked.chat or not asked.prompt, skip_special_tokens=True),
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )


@contextmanager
def _model_folder(asked: Request) -> Iterator[Path]:
    """A folder that transformers or peft can read: the source itself, the model that its run exported, or an export of
    its checkpoint."""
    for folder in () if asked.initial else (asked.source, asked.source / "model"):
        if (folder / CONFIG).is_file() or (folder / ADAPTER).is_file():
            yield folder
            return
    if asked.initial:
        if not (asked.source / "config.yaml").is_file():
            raise ConfigError(f"{asked.source}: --initial needs the folder of a run, with its config.yaml")
        yield asked.source
        return
    with tempfile.TemporaryDirectory(prefix="cookbook-generate-") as place:
        export(asked.source.absolute(), Path(place) / "model", dtype=torch.float32)
        yield Path(place) / "model"


def _device(asked: str | None) -> torch.device:
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise EnvironmentProblem(f"--device={asked}: {first_line(error)}") from None
    return device


def _load(folder: Path, asked: Request, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if asked.initial:
        model, tokenizer = _initial(folder)
    else:
        introduce_of_run(folder)
        tokenizer = _tokenizer(folder, asked)
        try:
            if (folder / ADAPTER).is_file():
                model = _with_adapter(folder, asked)
            else:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        except CookbookError:
            raise
        except Exception as error:  # anything that a foreign folder may cause
            raise EnvironmentProblem(f"{folder}: cannot be loaded: {first_line(error)}") from None
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def _initial(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a run before its first step, and the tokenizer of its data."""
    config = from_yaml((folder / "config.yaml").read_text())
    model = build_causal(config)
    weights = open_weights(config.model, model, seed=config.train.seed)(model)
    materialize(model, weights, device=torch.device("cpu"), dtype=torch.float32)
    model.config.use_cache = True
    tokenizer = tokenizer_to_export(config)
    if not tokenizer.get_vocab():
        raise ConfigError(f"{folder}: its run has no tokenizer (data.source={config.data.source})")
    return model, tokenizer


def _tokenizer(folder: Path, asked: Request) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        why = "it holds no tokenizer" if not [*folder.glob("*token*")] else first_line(error)
        raise ConfigError(
            f"{asked.source}: cannot turn text into tokens ({why}); train with a data.tokenizer, or copy the model's"
            " tokenizer files there"
        ) from None


def _with_adapter(folder: Path, asked: Request) -> PreTrainedModel:
    said = json.loads((folder / ADAPTER).read_text())
    if not (base := asked.base or said.get("base_model_name_or_path")):
        raise ConfigError(f"{folder}: does not name the model that it belongs to; give --base FOLDER")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except Exception as error:
        raise ConfigError(
            f"{folder}: its model {base} cannot be loaded ({first_line(error)}); give --base FOLDER"
        ) from None
    if (kind := linear.ours(said)) is not None:
        kind.load(model, folder)
        return model
    try:
        from peft import PeftModel
    except ImportError:
        raise EnvironmentProblem(f"{folder}: holds an adapter, which peft reads; pip install peft") from None
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder))  # pyright: ignore[reportReturnType]


def _encoded(tokenizer: PreTrainedTokenizerBase, asked: Request, device: torch.device) -> torch.Tensor:
    """Token ids of shape (1, tokens). An empty prompt becomes the token that begins a document."""
    if asked.chat:
        if not tokenizer.chat_template:
            raise ConfigError(f"--chat: the tokenizer of {asked.source} has no chat template; leave --chat out")
        message = [{"role": "user", "content": asked.prompt}]
        try:
            text: Any = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a foreign program
            raise ConfigError(
                f"--chat: the chat template of {asked.source} fails on a user's message ({first_line(error)}); mend it,"
                " or leave --chat out"
            ) from None
        ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(asked.prompt)["input_ids"]
    if not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ConfigError(f"prompt: must not be empty: {asked.source} has no token that a document begins with")
        ids = [first]
    return torch.tensor([ids], device=device)


def _room(model: PreTrainedModel, length: int, asked: Request) -> int:
    """Number of tokens that the model can take after a prompt of this length."""
    longest = sizes(model.config.to_dict()).positions
    if longest is None:
        return asked.tokens
    if length >= longest:
        raise ConfigError(f"prompt: has {length} tokens, and the model of {asked.source} takes {longest}; shorten it")
    return longest - length
