"""Continue from an adapter: its folder's settings become the configuration, or are refused. Needs no torch.

    model.path=ADAPTER                     -> model.path=its base, tuning.adapter=ADAPTER, tuning.* as it was trained
    model.path=BASE tuning.adapter=ADAPTER -> the same, for a base that has moved

A setting that this trainer does not support, and that changes what the adapter computes, is refused by name. The
adapted modules are read from the names of the tensors, because peft's own matching rules depend on its version.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from configs.choices import AdapterInit, TuningMethod, Weights
from configs.errors import ConfigError, DataError
from configs.schema import Config, Tuning

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
MERGE = "python -m trainer.checkpoint merge"
LORA, OWN_KIND = "LORA", "BOTTLENECK"
"""The second kind belongs to `tuning=adapter`, which peft does not have."""
BOTTLENECK = ("bottleneck", "after_attention")
"""Fields of `Tuning` on which such an adapter depends, under the same names in its folder."""
METHODS = {LORA: (TuningMethod.lora, TuningMethod.qlora), OWN_KIND: (TuningMethod.adapter,)}
"""peft's name for a kind of adapter -> the methods that can continue from it; messages name the first."""
HARMLESS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_type",
        "peft_version",
        "task_type",
    ),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "ensure_weight_tying"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "modules_to_save"),
    *BOTTLENECK,
}
"""Fields that are honoured below, follow from the tensors, or do not affect what is computed."""
STARTS = {
    **{True: AdapterInit.kaiming, False: AdapterInit.kaiming, "gaussian": AdapterInit.gaussian},
    **{name: AdapterInit.kaiming for name in ("orthogonal", "eva")},
    **{"pissa": AdapterInit.pissa, "olora": AdapterInit.olora},
}
"""Initialisations that leave the base unchanged, or change it reproducibly."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """fields: contents of adapter_config.json. shapes: shape of each tensor, by its name in the file."""

    path: Path
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def base(self) -> str | None:
        found = self.fields.get("base_model_name_or_path")
        return found if isinstance(found, str) and found else None


def is_adapter_folder(path: str | None) -> bool:
    return path is not None and bool(path.strip()) and (Path(path).expanduser() / CONFIG).is_file()


def _check_one(path: str | None, key: str) -> None:
    """Raise ConfigError for a folder that holds several adapters, as peft saves them: one run trains one."""
    folder = Path(path).expanduser() if path and path.strip() else None
    if folder is None or is_adapter_folder(path) or (folder / "config.json").is_file() or not folder.is_dir():
        return
    found = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    if found:
        raise ConfigError(f"{key}: holds adapters of its own ({', '.join(found)}); give one of them, {key}/{found[0]}")


def read_adapter(path: str, key: str) -> AdapterFolder:
    """key: `model.path=...`, for the messages. Raises DataError if the folder is incomplete."""
    folder = Path(path).expanduser()
    try:
        found = json.loads((folder / CONFIG).read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}")
    except OSError as error:
        raise DataError(
            f"{key}: {CONFIG} cannot be read ({error.strerror}); give a folder that peft, or this trainer, has written"
        ) from None
    except ValueError as error:
        raise DataError(f"{key}: {CONFIG} is no JSON object ({error}); copy the folder again") from None
    return AdapterFolder(folder, found, _shapes(folder / TENSORS, key))


def _shapes(file: Path, key: str) -> dict[str, tuple[int, ...]]:
    """From the header: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            begin, size = stream.tell(), file.stat().st_size
        named = {name: value for name, value in header.items() if name != "__metadata__"}
        if begin + max((value["data_offsets"][1] for value in named.values()), default=0) != size:
            raise ValueError("it is truncated")
        return {name: tuple(value["shape"]) for name, value in named.items()}
    except OSError as error:
        raise DataError(
            f"{key}: {file.name} cannot be read ({error.strerror}); save the adapter as safetensors, or copy it again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise DataError(f"{key}: {file.name} is not whole ({error}); copy it again") from None


def adopt(config: Config, given: Collection[str]) -> None:
    """Copy the settings of an adapter's folder into the config, in place. given: the keys of the command line.

    Raises ConfigError, one line for each problem: a key that contradicts the folder, a missing base, an unsupported
    setting.
    """
    model, tuning = config.model, config.tuning
    key = f"model.path={model.path}" if tuning.adapter is None else f"tuning.adapter={tuning.adapter}"
    _check_one(tuning.adapter or model.path, key)
    if tuning.adapter is None and not is_adapter_folder(model.path):
        return
    adapter = read_adapter(tuning.adapter or str(model.path), key)
    problems = [*_check_method(config, adapter, key), *_check_base(config, adapter, key), *_foreign(adapter, key)]
    settings = {} if problems else _settings(adapter)
    problems += list(_contradicted(tuning, settings, given, key))
    if problems:
        raise ConfigError(*problems)
    if tuning.adapter is None:
        model.path = adapter.base
        model.revision = model.revision or adapter.fields.get("revision")
    tuning.adapter = str(adapter.path)
    for name, value in settings.items():
        setattr(tuning, name, value)
    if config.data.tokenizer is None and (adapter.path / "tokenizer_config.json").is_file():
        config.data.tokenizer = str(adapter.path)


def adapter_tuning(adapter: AdapterFolder, key: str) -> Tuning:
    """The settings of an adapter of LoRA. Raises ConfigError for one that this trainer does not have."""
    if problems := list(_foreign(adapter, key)):
        raise ConfigError(*problems)
    return Tuning(method=TuningMethod.lora, **_settings(adapter))


def _check_method(config: Config, adapter: AdapterFolder, key: str) -> Iterator[str]:
    kind = adapter.fields.get("peft_type")
    methods = METHODS.get(str(kind))
    if methods is None:
        yield (
            f"{key}: holds an adapter of kind {kind}, from which no run goes on; begin from its base"
            f" ({adapter.base}), or {_merged(adapter)}"
        )
    elif config.tuning.method not in methods:
        yield (
            f"tuning={config.tuning.method}: {key} holds an adapter; set tuning={methods[0]} to go on from it, or"
            f" {_without(adapter)}"
        )
    if config.model.weights is not Weights.pretrained:
        yield (
            f"model.weights={config.model.weights}: {key} holds an adapter, which means nothing upon random weights;"
            " set model.weights=pretrained"
        )


def _check_base(config: Config, adapter: AdapterFolder, key: str) -> Iterator[str]:
    """A hub id is checked later, by the code that reads models."""
    if config.tuning.adapter is not None:
        if config.model.path is None:
            yield f"{key}: needs its base; set model.path=BASE"
        elif is_adapter_folder(config.model.path):
            yield f"model.path={config.model.path}: holds an adapter too; {_merged(adapter, str(config.model.path))}"
        return
    base, remedy = adapter.base, f"set model.path=BASE tuning.adapter={adapter.path}"
    if base is None:
        yield f"{key}: does not name the model that it was trained upon; {remedy}"
    elif not Path(base).expanduser().is_dir() and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        yield f"{key}: was trained upon {base}, which is not here; {remedy}"


def _foreign(adapter: AdapterFolder, key: str) -> Iterator[str]:
    kept = {name: value for name, value in adapter.fields.items() if name not in HARMLESS}
    if kept.get("bias") == "none":
        del kept["bias"]
    start = adapter.fields.get("init_lora_weights", True)
    if start not in STARTS:
        kept["init_lora_weights"] = start
    for name, value in kept.items():
        if value:
            yield f"{key}: {CONFIG} has {name}={value}, which this trainer does not have; {_merged(adapter)}"


def _without(adapter: AdapterFolder) -> str:
    return f"begin from its base ({adapter.base})" if adapter.fields["peft_type"] == OWN_KIND else _merged(adapter)


def _merged(adapter: AdapterFolder, path: str | None = None) -> str:
    return f"merge it into its model ({MERGE} {path or adapter.path} OUT), and give model.path=OUT"


def _settings(adapter: AdapterFolder) -> dict[str, Any]:
    """Fields of `Tuning` that this adapter sets."""
    said, names = adapter.fields, [name.removeprefix(ROOT) for name in adapter.shapes]
    if said["peft_type"] == OWN_KIND:
        return {name: said[name] for name in BOTTLENECK if name in said}
    # For stacked experts we name the module; adapter_config.json names the parameter.
    stacks = said.get("target_parameters") or []
    adapted = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    linears = adapted - {owner for owner in adapted if any(_of(owner, stack) for stack in stacks)}
    linears |= {stack.removesuffix(".weight") for stack in stacks if stack.endswith(".weight")}
    targets, layers = _grouped(linears)
    return {
        "rank": said.get("r"),
        "alpha": float(said.get("lora_alpha", 0)),
        "dropout": float(said.get("lora_dropout", 0)),
        "rslora": bool(said.get("use_rslora")),
        "dora": bool(said.get("use_dora")),
        "init": STARTS[said.get("init_lora_weights", True)],
        "target_modules": [*targets, *sorted(stack for stack in stacks if not stack.endswith(".weight"))],
        "layers": layers,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in names if ".lora_" not in name}),
    }


def _of(owner: str, stack: str) -> bool:
    """Whether the module of that name holds the stack's parameter, however deeply peft has wrapped it."""
    module, plain = stack.rpartition(".")[0], owner.replace(".base_layer", "")
    return plain == module or plain.endswith(f".{module}")


def _grouped(names: Collection[str]) -> tuple[list[str], list[int]]:
    """Names of the adapted parts and their layer numbers, if every layer has the same parts; else whole names."""
    found: dict[str, set[int]] = {}
    for name in names:
        number = next((word for word in name.split(".") if word.isdigit()), "")
        rest = name.partition(f".{number}.")[2] if number else ""
        found.setdefault(rest, set()).add(int(number or 0))
    layers = next(iter(found.values()), set[int]())
    if "" in found or any(numbers != layers for numbers in found.values()):
        return sorted(names), []
    return sorted(found), sorted(layers)


FREE = {"dropout"}
"""Fields that another run may change: they belong to training, not to the adapter."""


def _contradicted(tuning: Tuning, settings: dict[str, Any], given: Collection[str], key: str) -> Iterator[str]:
    """Keys whose value differs from the adapter's. Free settings are taken from the folder."""
    plain = Tuning()
    for field in fields(Tuning):
        name = field.name
        if name not in settings:
            continue
        here, there = getattr(tuning, name), settings[name]
        if f"tuning.{name}" not in given and here == getattr(plain, name):
            continue
        if name in FREE:
            settings[name] = here
        elif here != there:
            yield f"tuning.{name}={here}: the adapter of {key} has {_short(there)}; leave the key out"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
