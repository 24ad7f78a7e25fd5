"""Any Hugging Face causal LM, built without memory.

    build_hf_config   preset, folder or hub id, with overrides   -> the Hugging Face config
    build_model       its class, parameters on the meta device   -> shapes and names, no bytes

Next: `causal`; then `filling` gives the parameters memory and values.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from configs.choices import Attention
from configs.errors import ConfigError, CookbookError, DataError
from configs.schema import Model
from trainer.model.custom import introduce
from trainer.model.stored import local_folder, not_on_the_hub, read_config
from trainer.plan.model_fields import check_experts, check_sizes, merged, text_fields, text_part

ON_META = {torch.empty: (2**20, 0), torch.zeros: (2**26, 3)}
"""What creates tensors on the meta device, and from how many values and dimensions on."""


def build_hf_config(model: Model) -> PretrainedConfig:
    """The Hugging Face config with `model.config` applied on top.

    Raises ConfigError for an unknown architecture or field, DataError if the folder or hub id cannot be read.
    """
    kind = introduce(model)
    plain, fields = _from_path(model, model.path) if model.path is not None else _from_preset(model)
    if kind is not None and plain.model_type != kind:
        raise ConfigError(
            f"model.path={model.path}: is a {plain.model_type}, model.target={model.target} a {kind}; leave one out"
        )
    overrides = {key: value for key, value in model.config.items() if key != "model_type"}
    _check_fields(plain, overrides)
    part = text_part(plain.to_dict())
    fields = merged(fields, _in_place(plain, overrides, part))
    if problems := [*check_sizes(text_fields(fields), model)]:
        raise ConfigError(*problems)
    _cut_layer_types(text_fields(overrides), fields.get(part or "", fields))
    try:
        built = type(plain)(**fields)
    except Exception as error:  # each architecture validates in its own way
        raise ConfigError(f"model.config={model.config or fields}: {_one_line(error)}") from None
    if problems := [*check_experts(text_config(built).to_dict(), model)]:
        raise ConfigError(*problems)
    return _text_alone(built) if model.text_only else built


def _text_alone(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model; unchanged if transformers builds it from the whole config."""
    text = text_config(config)
    if text is config:
        raise ConfigError(f"model.text_only=true: a {config.model_type} is a language model already; leave it out")
    return text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's own config: part of a composite one. Raises ConfigError if there are several."""
    try:
        return config.get_text_config()
    except ValueError as error:
        raise ConfigError(f"model: a {config.model_type} is no causal language model: {_one_line(error)}") from None


def _cut_layer_types(overrides: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """A list with an entry per layer, stored by some architectures: the first layers keep theirs."""
    layers, kinds = fields.get("num_hidden_layers"), fields.get("layer_types")
    if "num_hidden_layers" in overrides and "layer_types" not in overrides and kinds:
        fields["layer_types"] = kinds[:layers]


def _from_path(model: Model, path: str) -> tuple[PretrainedConfig, dict[str, Any]]:
    folder = local_folder(path)
    if folder is not None:
        read_config(folder, f"model.path={path}")
    where: Any = folder or path
    try:
        options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        plain = AutoConfig.from_pretrained(where, **options)
        fields = PretrainedConfig.get_config_dict(where, **options)[0]
    except Exception as error:  # each architecture reads its fields in its own way, and a hub fails in many
        said = f"model.path={path}: config.json: {_one_line(error)}" if folder else not_on_the_hub(path, error)
        raise DataError(said) from None
    # The storage format of the values, not the model; `fitting` reads it from the file.
    for name in ("quantization_config", "compression_config"):
        fields.pop(name, None)
    return plain, fields


def _from_preset(model: Model) -> tuple[PretrainedConfig, dict[str, Any]]:
    fields = {**model.architecture}
    fields["model_type"] = introduce(model) or model.config.get("model_type", fields.get("model_type"))
    try:
        plain = AutoConfig.for_model(str(fields["model_type"]))
    except Exception as error:
        raise ConfigError(f"model.config.model_type={fields['model_type']}: {_one_line(error)}") from None
    preset = {key: value for key, value in model.architecture.items() if key != "model_type"}
    _check_fields(plain, preset)
    return plain, {"model_type": fields["model_type"], **_in_place(plain, preset, text_part(plain.to_dict()))}


def _in_place(plain: PretrainedConfig, fields: dict[str, Any], part: str | None) -> dict[str, Any]:
    """The config's fields, also those that a composite config keeps in its language model's part."""
    if part is None:
        return fields
    moved = {name: value for name, value in fields.items() if name not in _known_fields(plain)}
    kept = {name: value for name, value in fields.items() if name not in moved}
    return {**kept, part: {**(kept.get(part) or {}), **moved}} if moved else kept


def _known_fields(config: PretrainedConfig) -> set[str]:
    return {*config.to_dict(), *config.attribute_map, "pad_token_id", "bos_token_id", "eos_token_id", "dtype"}


def _check_fields(config: PretrainedConfig, overrides: dict[str, Any]) -> None:
    """Refuse a misspelt field: Hugging Face would store any name and no layer would read it."""
    part = text_part(config.to_dict())
    known = _known_fields(config) | (_known_fields(getattr(config, part)) if part is not None else set())
    unknown = [name for name in overrides if name not in known]
    if unknown:
        unknown = [name for name in unknown if name not in _undeclared_fields(config)]
    if unknown:
        raise ConfigError(
            *(
                f"model.config.{name}={overrides[name]}: {type(config).__name__} has no such field; it has"
                f" {', '.join(sorted(known - {'transformers_version'}))}"
                for name in unknown
            )
        )


def _undeclared_fields(config: PretrainedConfig) -> set[str]:
    """Fields that the model's code reads although its config's class does not declare them. The published config of
    Qwen 3 30B-A3B has one: head_dim."""
    text = text_config(config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if model is None:
        return set()
    source = inspect.getsource(sys.modules[model.__module__])
    return set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', source))


class _LargeOnMeta(TorchFunctionMode):
    """Create large uninitialised tensors directly on the meta device. accelerate first creates each parameter in
    memory, and one layer's experts in DeepSeek V3 take 28 GiB in float32. Normal values are not drawn there: torch
    takes half a millisecond to find that there is nothing to write.

    Llama 4's experts begin as zeros, 5 GiB in each layer. Other zeros become a buffer that the model writes to, such as
    a table of positions, but none of these has three dimensions and as many values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ and args[0].is_meta:
            return args[0]
        if func in ON_META and kwargs.get("device") is None:
            least, dimensions = ON_META[func]
            sizes = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            sizes = sizes or kwargs.get("size", ())
            if len(sizes) >= dimensions and prod(sizes) >= least:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_model(model: Model, config: PretrainedConfig) -> PreTrainedModel:
    """The model with parameters on the meta device. Buffers (rotary tables) are real: they are small, and no weight
    file holds them. Raises ConfigError if the architecture refuses the config or the attention."""
    attention = None if model.attention is Attention.auto else str(model.attention)
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            built = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=model.trust_remote_code
            )
    except CookbookError:
        raise
    except Exception as error:  # any architecture's constructor, on values that nobody has tried
        given = f", model.config={model.config}" if model.config else ""
        raise ConfigError(f"{named(model)}{given}, model.attention={model.attention}: {_one_line(error)}") from None
    # FSDP2 replaces the model's class by its own; the export must name the architecture.
    built.config.architectures = [type(built).__name__]
    built.tie_weights()
    body_first(built)
    built.config.use_cache = False
    return built


def body_first(model: PreTrainedModel) -> None:
    """A tied weight has the name of its first owner, which must be the embedding on every pipeline stage. Some models
    (CamemBERT) register their head before their body."""
    embedding = model.get_input_embeddings()
    body = next((name for name, part in model.named_children() if any(m is embedding for m in part.modules())), None)
    if body is not None:
        model._modules = {body: model._modules[body], **model._modules}


def named(model: Model) -> str:
    """The model as the user named it, for messages."""
    if model.path is not None:
        return f"model.path={model.path}"
    return f"model={model.preset}" if model.target is None else f"model.target={model.target}"


class Elsewhere(nn.Module):
    """Replaces a part of the model that another pipeline stage holds. It has no parameters; subclasses define its
    effect."""


def architecture(model: PreTrainedModel) -> str:
    """Name of the model's class, even if a sharding engine has replaced it."""
    return next(iter(model.config.architectures or ()), type(model).__name__)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: among the ModuleLists that lie in no other (a layer's experts are a list too) the
    one whose length the config gives, or the longest; of several the outermost, since image and audio towers lie
    deeper. Raises ConfigError for a model without one."""
    if isinstance(model, PreTrainedModel) and model.config.get_text_config() is not model.config:
        # An image tower may have more layers than the language model.
        model = model.get_decoder()
    depths = {id(module): name.count(".") for name, module in model.named_modules()}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(module) for outer in lists for module in outer.modules() if module is not outer}
    lists = [module for module in lists if id(module) not in inner]
    if not lists:
        raise ConfigError(f"model: {type(model).__name__} has no list of decoder layers to work on")
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0) if isinstance(model, PreTrainedModel) else 0
    return max(lists, key=lambda stack: (len(stack) == count, len(stack), -depths[id(stack)]))


def held_layers(model: nn.Module) -> list[nn.Module]:
    """This rank's decoder layers: all of them, or those of its pipeline stage."""
    return [layer for layer in decoder_layers(model) if not isinstance(layer, Elsewhere)]


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names that share another name's parameter: {"lm_head.weight": "transformer.wte.weight"} for GPT-2."""
    owners: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            ties[name] = owner
    return ties


def _one_line(error: Exception) -> str:
    """An exception's text without line breaks, cut where a listing begins."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # its text is only the key
        text = f"there is no {text}"
    return text if len(text) <= 300 else text[:300] + " ..."
