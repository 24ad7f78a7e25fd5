"""The table of foreign fields (configs/foreign.yaml) agrees with the classes of the installed libraries."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs.foreign import look_up, table
from configs.imports.deepspeed import SIZES


def fields_of(module: str, cls: str) -> dict[str, str | None]:
    """Return the annotated fields of a class and their defaults, read from the source without importing it."""
    package, _, rest = module.partition(".")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0], *rest.split(".")).with_suffix(".py")
    body = next(
        node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef) and node.name == cls
    )
    return {
        node.target.id: _default(node.value)
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _default(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call):
        named = {each.arg: each.value for each in value.keywords}
        value = named.get("default", value.args[0] if value.args else None)
    return None if value is None else ast.unparse(value)


@pytest.mark.parametrize(
    ("section", "module", "cls", "prefix"),
    [
        ("training_arguments", "transformers.training_args", "TrainingArguments", ""),
        ("accelerate", "accelerate.commands.config.config_args", "ClusterConfig", ""),
        ("deepspeed", "deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", "zero_optimization."),
        (
            "deepspeed",
            "deepspeed.runtime.zero.offload_config",
            "DeepSpeedZeroOffloadOptimizerConfig",
            "zero_optimization.offload_optimizer.",
        ),
        (
            "deepspeed",
            "deepspeed.runtime.zero.offload_config",
            "DeepSpeedZeroOffloadParamConfig",
            "zero_optimization.offload_param.",
        ),
        ("deepspeed", "deepspeed.runtime.precision_config", "DeepSpeedFP16Config", "fp16."),
        ("deepspeed", "deepspeed.runtime.precision_config", "DeepSpeedBF16Config", "bf16."),
    ],
)
def test_the_table_knows_every_field_of_the_installed_libraries(
    section: str, module: str, cls: str, prefix: str
) -> None:
    """The table's defaults also equal those of the libraries."""
    found = fields_of(module, cls)
    sections = {name.rpartition(".")[0] for name in table()[section]}
    missing = [
        name for name in found if look_up(section, f"{prefix}{name}") is None and f"{prefix}{name}" not in sections
    ]
    assert len(found) >= 5 and not missing
    for name, default in found.items():
        entry = look_up(section, f"{prefix}{name}")
        if entry is not None and isinstance(entry.default, (int, float)) and default is not None:
            assert ast.literal_eval(default) == entry.default, name


def test_sizes_that_deepspeed_takes_by_itself() -> None:
    found = fields_of("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig")
    for name, size in SIZES.items():
        text = found[name.removeprefix("stage3_")]
        assert text is not None and float(text.removeprefix("pp_int(").rstrip(")")) == size
