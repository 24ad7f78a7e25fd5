"""Compares a folder of weights with the model, by name, shape and dtype, before a value is read.

    every name fits              tensor by tensor, each rank reads what it holds
    names of another layout      by transformers' rules, which rename and merge them (experts stored one by one, ...)
    float8 or mxfp4 with scales  by transformers' rules, which multiply codes and scales
    anything else                one line for each problem

transformers itself says what it would do with the names: it loads a folder whose tensors have shapes and no values.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as their_logging

from configs.choices import MissingWeights
from configs.errors import DataError, first_line
from configs.schema import Model
from trainer.model.differences import Differences, describe_differences, row
from trainer.model.stored import Stored, some

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool}
DEQUANTIZED = ("fp8", "mxfp4")
"""Formats of `quantization_config` that transformers converts to 32-bit values on any machine."""
SCALE = "_scale_inv"
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that wrappers of a model leave when the wrapped model is saved."""
OLD_BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", "rotary_emb.inv_freq", "position_ids")
"""Masks and tables that earlier versions saved with the weights, and that are computed now."""
LANGUAGE_MODEL = "language_model"
"""Prefixes of a composite model's text part, whose names are otherwise those of the language model alone."""
TOWERS = ("vision_config", "audio_config", "speech_config")
TOWER_NAMES = re.compile(r"(^|\.)(vis\w*|vision\w*|audio\w*|speech\w*|multi_modal_projector|mm_\w+|img_\w+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How the values get into the model.

    names: the stored name of each of the model's, for reading tensor by tensor.
    drawn: missing names that the user allows.
    grown: number of stored rows of the tensors that get more.
    theirs: config for a conversion by transformers' rules (`converted`); None: tensor by tensor."""

    names: Mapping[str, str] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()
    grown: Mapping[str, int] = field(default_factory=dict)
    theirs: PretrainedConfig | None = None


def fit(
    model: PreTrainedModel, stored: Mapping[str, Stored], fields: Mapping[str, Any], folder: Path, choice: Model
) -> Fit:
    """Compare. model: unsplit, on the meta device. stored: from `read_tensors`. fields: the folder's own config.json.

    Raises DataError with a line for each problem.
    """
    key = f"model.path={choice.path}"
    quantized = _format(stored, fields, key)
    if quantized is None:
        found, whole = _compare(model, stored, fields, key), None
        if found.any:
            found, whole = _by_another_way(model, stored, fields, found, key)
    else:
        whole = _their_config(model, fields, quantized)
        found = _ask_transformers(model, stored, whole, fields)
    rows = _vocabulary(model)
    grown = {
        n: was[0] for n, (was, now) in found.shapes.items() if n in rows and was[0] < now[0] and was[1:] == now[1:]
    }
    if choice.resize_vocabulary:
        found.shapes = {name: pair for name, pair in found.shapes.items() if name not in grown}
    drawn = frozenset(found.missing) if choice.missing_weights is MissingWeights.random else frozenset()
    problems = list(describe_differences(found, stored, choice, grown=set(grown), allowed=len(drawn)))
    problems += _differing_ties(model, stored, folder, key) if not problems and whole is None else ()
    if problems:
        raise DataError(*problems)
    if whole is not None and grown:
        whole.get_text_config().vocab_size = next(iter(grown.values()))
    drawn |= frozenset(found.computed)
    return Fit(names=found.names, drawn=drawn, grown=grown, theirs=whole)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that are saved with a model, by name; for example routing biases of DeepSeek's experts."""
    for place, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield f"{place}.{leaf}" if place else leaf, buffer


def _format(stored: Mapping[str, Stored], fields: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """The quantization of a folder, for transformers; None if its values are stored unquantized. Raises DataError for
    codes that cannot be read."""
    said = fields.get("quantization_config") or fields.get("compression_config")
    method = str(said.get("quant_method", "unnamed")) if isinstance(said, dict) else None
    codes = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS and tensor.dtype not in INTEGERS]
    float8 = [
        name for name in codes if stored[name].dtype.startswith("F8_E4") or stored[name].dtype.startswith("F8_E5")
    ]
    if method is None and float8 and all(f"{name}{SCALE}" in stored for name in float8) and len(float8) == len(codes):
        said, method = {"quant_method": "fp8"}, "fp8"
    if method is None or (method in DEQUANTIZED and not codes):
        wrong = [name for name in codes if not name.endswith(OLD_BUFFERS)]
        if wrong:
            first = stored[wrong[0]]
            raise DataError(
                f"{key}: {first.file} holds {some(wrong)} as {first.dtype}, codes without the scales to read them with;"
                " give the weights in bfloat16, float16 or float32"
            )
        return None
    if method not in DEQUANTIZED:
        raise DataError(
            f"{key}: its weights are quantized as {method} (quantization_config in config.json), and only"
            f" {' and '.join(DEQUANTIZED)} can be read back; give the weights in bfloat16, float16 or float32"
        )
    bare = [
        name for name in float8 if f"{name}{SCALE}" not in stored and f"{name.rpartition('.')[0]}.scale" not in stored
    ]
    if method == "fp8" and bare:
        raise DataError(
            f"{key}: {stored[bare[0]].file} holds {some(bare)} as {stored[bare[0]].dtype} without {bare[0]}{SCALE};"
            " copy the folder again, or give the weights in bfloat16"
        )
    assert isinstance(said, dict)
    return said


def _compare(model: PreTrainedModel, stored: Mapping[str, Stored], fields: Mapping[str, Any], key: str) -> Differences:
    """Name by name, as in the model, with or without the prefix of the bare model (GPT-2 on the hub)."""
    found = Differences()
    prefix, used = f"{model.base_model_prefix}.", set()
    for names, tensor in needed(model):
        places = [(n, c) for n in names for c in (n, n.removeprefix(prefix), prefix + n) if c in stored]
        if not places:
            found.missing.append(names[0])
            continue
        used.update(place for _, place in places)
        found.names.update(dict.fromkeys(names, places[0][1]))
        shape = stored[places[0][1]].shape
        if shape != tuple(tensor.shape):
            found.shapes[names[0]] = (shape, tuple(tensor.shape))
    ignored = _ignored(model, fields)
    found.unknown = [name for name in stored if name not in used and not ignored(name)]
    may_miss = _pattern(getattr(model, "_keys_to_ignore_on_load_missing", None))
    if may_miss is not None:
        found.computed = [name for name in found.missing if may_miss.search(name)]
        found.missing = [name for name in found.missing if not may_miss.search(name)]
    integers = [n for n, place in found.names.items() if stored[place].dtype not in FLOATS]
    parameters = {name for name, _ in model.named_parameters()}
    wrong = [stored_name for n in integers if n in parameters and (stored_name := found.names[n])]
    if wrong:
        first = stored[wrong[0]]
        found.broken.append(
            f"{key}: {first.file} holds {some(wrong)} as {first.dtype}, which are no values of a weight; give the"
            " weights in bfloat16, float16 or float32"
        )
    return found


def needed(model: PreTrainedModel) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Every tensor of a saved model, with all its names: tied weights have several."""
    names: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *persistent_buffers(model)]:
        names[id(tensor)].append(name)
        tensors[id(tensor)] = tensor
    yield from ((names[key], tensor) for key, tensor in tensors.items())


def _ignored(model: PreTrainedModel, fields: Mapping[str, Any]) -> Any:
    """Whether a stored name that the model does not have may be ignored: by its class's rules, as a buffer of older
    versions, or as a part of a multimodal model of which this class is the text model."""
    declared = _pattern(getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    prefix = f"{model.base_model_prefix}."
    buffers = {row(name.removeprefix(prefix)) for name, _ in model.named_buffers()}
    towers = any(isinstance(fields.get(name), dict) for name in TOWERS)

    def ignored(name: str) -> bool:
        return (
            (declared is not None and declared.search(name) is not None)
            or row(name.removeprefix(prefix)) in buffers
            or name.endswith(OLD_BUFFERS)
            or (towers and TOWER_NAMES.search(name) is not None)
        )

    return ignored


def _pattern(patterns: Any) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _by_another_way(
    model: PreTrainedModel, stored: Mapping[str, Stored], fields: Mapping[str, Any], direct: Differences, key: str
) -> tuple[Differences, PretrainedConfig | None]:
    """Names that do not fit directly: without a wrapper's prefix, or by transformers' own renaming. If problems remain,
    the variant with fewer of them reports them."""
    wrappers = WRAPPERS if model.config.get_text_config() is not model.config else (*WRAPPERS, LANGUAGE_MODEL)
    if not direct.broken and any(part in wrappers for name in stored for part in name.split(".")):
        plain = {".".join(part for part in name.split(".") if part not in wrappers): name for name in stored}
        if len(plain) == len(stored):
            unwrapped = _compare(model, {name: stored[old] for name, old in plain.items()}, fields, key)
            if not unwrapped.any:
                unwrapped.names = {name: plain[place] for name, place in unwrapped.names.items()}
                return unwrapped, None
    config = copy.deepcopy(model.config)
    theirs = _ask_transformers(model, stored, config, fields)
    theirs.broken += direct.broken
    wrong = [len(d.missing) + len(d.unknown) + len(d.shapes) + len(d.broken) for d in (direct, theirs)]
    return (theirs, config) if wrong[1] < wrong[0] else (direct, None)


def _their_config(model: PreTrainedModel, fields: Mapping[str, Any], quantized: Mapping[str, Any]) -> PretrainedConfig:
    config = copy.deepcopy(model.config)
    vars(config)["quantization_config"] = {**quantized, "dequantize": True}
    return config


def _ask_transformers(
    model: PreTrainedModel, stored: Mapping[str, Stored], config: PretrainedConfig, fields: Mapping[str, Any]
) -> Differences:
    """transformers' own report on loading tensors of these names, shapes and dtypes; there are no values."""
    dtypes = FLOATS | CODES | INTEGERS
    tensors = {n: torch.empty(t.shape, dtype=dtypes.get(t.dtype), device="meta") for n, t in stored.items()}
    options: dict[str, Any] = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True}
    kind: Any = type(model)
    try:
        with quiet():
            _, info = kind.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # its conversions fail in many ways, and log the place
        holes = _holes(list(stored))
        said = f"it lacks {some(holes)}" if holes else first_line(error)
        return Differences(broken=[f"transformers cannot put its tensors together ({said}); copy the folder again"])
    same = {name: names for names, _ in needed(model) for name in names}
    missing = {same[name][0] for name in info["missing_keys"] if name in same}
    ignored = _ignored(model, fields)
    return Differences(
        missing=[name for name in dict.fromkeys(names[0] for names in same.values()) if name in missing],
        unknown=sorted(name for name in info["unexpected_keys"] if not ignored(name)),
        shapes={same.get(n, [n])[0]: (tuple(was), tuple(now)) for n, was, now in info["mismatched_keys"]},
    )


def _holes(names: list[str]) -> list[str]:
    """Missing names whose neighbours exist: for example expert 1 of layer 0, if 0, 2 and 3 exist."""
    rows: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        rows[row(name)].add(tuple(re.findall(r"\d+", name)))
    holes = []
    for pattern, found in rows.items():
        every = [sorted({numbers[i] for numbers in found}, key=int) for i in range(pattern.count("{}"))]
        if 1 < len(every) < 4:
            holes += [pattern.format(*numbers) for numbers in product(*every) if numbers not in found]
    return holes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers prints tables and bars about its findings; our own lines replace them."""
    level, bar = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity(logging.CRITICAL)
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if bar:
            their_logging.enable_progress_bar()


def _vocabulary(model: PreTrainedModel) -> set[str]:
    """Names of the tensors with a row per token."""
    owners = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {n for names, tensor in needed(model) for n in names if any(_owns(owner, tensor) for owner in owners)}


def _owns(owner: nn.Module | None, tensor: torch.Tensor) -> bool:
    return owner is not None and any(parameter is tensor for parameter in owner._parameters.values())


def _differing_ties(model: PreTrainedModel, stored: Mapping[str, Stored], folder: Path, key: str) -> Iterator[str]:
    """A head that is stored with its own values, although the model's config.json ties it to the embedding."""
    prefix = f"{model.base_model_prefix}."
    for names, _ in needed(model):
        held = list(dict.fromkeys(c for n in names for c in (n, n.removeprefix(prefix), prefix + n) if c in stored))
        if len(held) > 1 and not _equal(*(_read(folder, stored[name].file, name) for name in held[:2])):
            yield (
                f"{key}: {stored[held[1]].file}: {held[1]} differs from {held[0]}, to which config.json ties it; set"
                " model.config.tie_word_embeddings=false to use both"
            )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _read(folder: Path, file: str, name: str) -> torch.Tensor:
    with safe_open(folder / file, framework="pt") as opened:
        return opened.get_tensor(name)
