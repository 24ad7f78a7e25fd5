"""The imports follow the rules of the architecture: no layer imports a higher one, and quick answers need no torch."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import resolve_name
from pathlib import Path

import pytest

from configs.choices import OptimizerName, TuningMethod
from configs.load import composed_options
from trainer.axes import AXES
from trainer.linear import KINDS
from trainer.optim.table import OPTIMIZERS
from trainer.plan.model_fields import CHOSEN, EXPERTS, MLP, NAMES
from trainer.plan.model_fields import KINDS as KINDS_OF_LAYERS

ROOT = Path(__file__).parent.parent
PACKAGES = [
    folder.name for folder in sorted(ROOT.iterdir()) if (folder / "__init__.py").exists() and folder.name != "tests"
]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    .removesuffix(".__init__")
    .removeprefix("launch.python."): file
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
    if "examples" not in file.parts  # user programs, which import the public API
}

# configs <- trainer <- launch; configs, trainer <- slurm; slurm <- launch.
MAY_IMPORT = {
    "configs": {"configs"},
    "trainer": {"configs", "trainer"},
    "slurm": {"configs", "trainer", "slurm"},
    "launch": {"configs", "trainer", "slurm", "launch"},
    "cookbook": {"configs", "trainer", "launch", "cookbook"},  # in launch/python: the public package
}
# Importing one of these libraries takes a second or more.
HEAVY = {
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "datasets",
    "pyarrow",
    "numpy",
    "wandb",
    "safetensors",
    "ray",
}
# The LIGHT modules alone answer `--help`, `--cfg job`, and config and plan errors.
# The doctor imports its torch-based checks after it has printed the first lines.
EXAMINES = ("launch.doctor.machine", "launch.doctor.layouts")
LIGHT = [name for name in MODULES if name.startswith(("configs", "launch", "cookbook")) and name not in EXAMINES]
LIGHT += ["trainer.make_plan", "trainer.__main__"]


def imports(module: str, *, at_import: bool) -> Iterator[str]:
    """Yields the modules that `module` imports.

    at_import: only module-level imports, no imports inside functions or for type checkers.
    """
    tree = ast.parse(MODULES[module].read_text())
    for node in _outside_functions(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
            source = resolve_name("." * node.level + (node.module or ""), package)
            taken = [name for alias in node.names if (name := f"{source}.{alias.name}") in MODULES]
            yield from taken if len(taken) == len(node.names) else (source, *taken)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def reached(module: str) -> dict[str, str]:
    """Returns every module that importing `module` loads, each with the module that imports it."""
    found: dict[str, str] = {}
    waiting = [(module, "")]
    while waiting:
        name, asker = waiting.pop()
        if name in found:
            continue
        found[name] = asker
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        waiting += [(parent, name) for parent in parents]
        if name in MODULES:
            waiting += [(imported, name) for imported in imports(name, at_import=True)]
    return found


def test_modules_were_found() -> None:
    assert {"configs", "launch", "trainer"} <= set(PACKAGES) <= set(MAY_IMPORT)
    assert len(MODULES) >= 50


@pytest.mark.parametrize("module", MODULES)
def test_arrows_never_turn_back(module: str) -> None:
    ours = {name.partition(".")[0] for name in imports(module, at_import=False)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[module.partition(".")[0]]


def circles(below: dict[str, set[str]]) -> set[str]:
    """Returns the names that are part of an import cycle or depend on one.

    below: name -> the names that it uses.
    """
    below = dict(below)
    while ground := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in ground:
            del below[name]
    return {*below}


def test_files_form_no_circle() -> None:
    """Imports inside functions and imports for type checkers count too."""
    below = {name: {*imports(name, at_import=False)} - {name} for name in MODULES}
    assert below["trainer.run.loop"] >= {"trainer.engine", "trainer.run.step"}
    assert not circles(below)


def test_rooms_of_the_trainer_form_no_circle() -> None:
    """Folders and top-level modules of the trainer only import from lower ones."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    rooms = {room(module) for module in MODULES if module.startswith("trainer.")} - {"trainer.__main__"}
    below: dict[str, set[str]] = {name: set() for name in rooms}
    for module in MODULES:
        if room(module) in rooms:
            used = {room(name) for name in imports(module, at_import=False)}
            below[room(module)] |= used & rooms - {room(module)}
    assert len(below) >= 10 and below["trainer.run"] >= {"trainer.engine", "trainer.checkpoint"}
    assert not circles(below)


def test_the_rule_about_circles_can_fail() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"a", "b", "c"}


# Modules that may spell an axis name: the schema, whose fields are the keys of the degrees, and each axis' own module.
NAMED = {"configs.schema", *(name for name in MODULES if name.startswith("trainer.axes"))}


def axes_in_quotes(source: str) -> set[str]:
    words = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    return {axis.name for axis in AXES if axis.name in words}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - NAMED))
def test_mesh_axes_are_named_in_their_modules_alone(module: str) -> None:
    assert not axes_in_quotes(MODULES[module].read_text())


def test_the_rule_about_axes_can_fail() -> None:
    assert axes_in_quotes(MODULES["trainer.axes.tensor"].read_text()) == {"tp"}


PRESETS = composed_options("parallel")


def presets_in_quotes(source: str) -> Iterator[str]:
    """Yields layout names that the code depends on. Messages may suggest an existing layout as `parallel=NAME`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from {node.value} & PRESETS.keys()
            suggested = re.findall(r"(?<![\w.])parallel=([a-z0-9]\w*)", node.value)
            yield from (f"parallel={name}" for name in suggested if name not in PRESETS)


# The config files of other trainers have fields with the same names.
FOREIGN = [name for name in MODULES if name.startswith("configs.imports.")]


@pytest.mark.parametrize("module", [name for name in MODULES if name not in FOREIGN])
def test_presets_are_named_in_their_files_alone(module: str) -> None:
    assert not [*presets_in_quotes(MODULES[module].read_text())]


def test_the_rule_about_presets_can_fail() -> None:
    found = presets_in_quotes('name == "fsdp", "use parallel=zero9, or parallel=zero3"')
    assert {*found} == {"fsdp", "parallel=zero9"}


def test_hydra_is_imported_by_the_loader_and_its_readers_alone() -> None:
    users = [
        name for name in MODULES if any(used.partition(".")[0] == "hydra" for used in imports(name, at_import=False))
    ]
    # User scripts are not part of the package.
    users = [name for name in users if not name.startswith("launch.examples.")]
    assert users == ["configs.files", "configs.load", "configs.overrides", "configs.sections"]


CHOICES = {
    "optimizer.name": ({*OptimizerName} - {OptimizerName.custom}, "OptimizerName", ("trainer.optim", "configs.schema")),
    # Only the methods whose names are not ordinary words are listed.
    "tuning.method": (
        {TuningMethod.lora, TuningMethod.qlora, TuningMethod.ia3, TuningMethod.p_tuning},
        "TuningMethod",
        ("trainer.linear", "trainer.inputs", "configs.schema", "configs.adapter_folder"),
    ),
}
"""Key -> its values, the class of these values, and the modules that may spell them. `configs.adapter_folder` may
because it turns an adapter folder's values into a configuration before the trainer is imported."""


def chosen_names(source: str, key: str) -> set[str]:
    """Returns the parts of a choice that a module spells: its field, its key, its class or one of its values. Messages
    may contain a value within a longer text."""
    words, kind, _ = CHOICES[key]
    section, field = key.split(".")
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & words | ({key} if re.match(rf"{key}\b", node.value) else set())
        elif isinstance(node, ast.Attribute) and node.attr == field:
            found |= {key} if ast.unparse(node.value).rpartition(".")[2] == section else set()
        elif isinstance(node, ast.Name) and node.id == kind:
            found.add(kind)
    return found


@pytest.mark.parametrize("key", CHOICES)
def test_choices_are_named_in_their_own_folders_alone(key: str) -> None:
    """Other modules query the chosen implementation through `trainer.optim.table` or `trainer.linear`."""
    own = (*CHOICES[key][2], "configs.choices", "configs.imports.")
    others = {name: file for name, file in MODULES.items() if not name.startswith(own)}
    users = {name: chosen_names(file.read_text(), key) for name, file in others.items()}
    assert len(others) > 200 and {name: found for name, found in users.items() if found} == {}


def test_the_rule_about_choices_can_fail() -> None:
    source = 'if config.tuning.method is TuningMethod.lora or x == "lora": y["tuning.method"]'
    assert chosen_names(source, "tuning.method") == {"lora", "tuning.method", "TuningMethod"}
    assert chosen_names("def f(optimizer): return optimizer.name", "optimizer.name") == {"optimizer.name"}


# MeZO steps without gradients, so it has its own update and its own engine. Only they may import the optimizer.
OF_ONE_CHOICE = {"trainer.update.mezo": "trainer.optim.mezo", "trainer.engine.mezo": "trainer.optim.mezo"}


def modules_of_choices() -> set[str]:
    """Returns the modules that implement an optimizer or a kind of layer."""
    ones = tuple(str(one.__name__) for one in (*OPTIMIZERS.values(), *KINDS))  # pyright: ignore[reportAttributeAccessIssue]
    parts = tuple(f"{one}{sign}" for one in ones for sign in "._")
    return {name for name in MODULES if name in ones or name.startswith((*parts, "trainer.inputs."))}


def test_others_import_the_tables_of_choices_alone() -> None:
    """Other modules import `trainer.optim.table` or `trainer.linear`, not the module of a single choice."""
    own = modules_of_choices()
    assert own >= {"trainer.optim.adamw", "trainer.optim.muon.owners", "trainer.linear.float8_layers"}
    users: dict[str, set[str]] = {}
    for name in MODULES:
        if not name.startswith(("trainer.optim", "trainer.linear", "trainer.inputs")):
            used = own & {*imports(name, at_import=False)}
            users[name] = {one for one in used if not one.startswith(OF_ONE_CHOICE.get(name, "none"))}
    assert {name: found for name, found in users.items() if found} == {}


# peft's adapter config has a field with one of these names.
NOT_OF_A_MODEL = {"trainer.inputs.layers": {"num_layers"}}


def test_other_names_for_a_field_of_a_model_stand_in_one_place() -> None:
    """transformers has one standard name per size. Only `trainer.plan.model_fields` knows the other names."""
    others = {name for names in (*NAMES.values(), CHOSEN, EXPERTS, KINDS_OF_LAYERS, MLP) for name in names[1:]}
    found: dict[str, set[str]] = {}
    for module in MODULES.keys() - {"trainer.plan.model_fields"}:
        tree = ast.walk(ast.parse(MODULES[module].read_text()))
        words = {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        found[module] = words & others - NOT_OF_A_MODEL.get(module, set())
    assert len(others) > 15 and {module: words for module, words in found.items() if words} == {}


@pytest.mark.parametrize("module", LIGHT)
def test_answers_need_no_torch(module: str) -> None:
    chains = {name: asker for name, asker in reached(module).items() if name.partition(".")[0] in HEAVY}
    assert not chains


def test_the_rule_about_torch_can_fail() -> None:
    assert "torch" in reached("trainer.run.loop")


def test_libraries_and_dependencies_are_the_same_set() -> None:
    """An undeclared library is missing from a fresh install, and a dependency that nothing imports is useless. A
    library that only one key needs is an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = _names(project["dependencies"])
    extras = {name: _names(lines) for name, lines in project["optional-dependencies"].items()}
    optional = set[str]().union(*(names for extra, names in extras.items() if extra != "dev"))
    assert not optional & declared and optional <= extras["dev"]
    used = {name.partition(".")[0] for module in MODULES for name in imports(module, at_import=False)}
    used |= {"matplotlib"}  # imported by `import_module` to draw a plot
    libraries = used - set(MAY_IMPORT) - set(sys.stdlib_module_names)
    assert len(libraries) >= 8
    distributions = packages_distributions()
    assert {_normal(distributions.get(library, [library])[0]) for library in libraries} - optional == declared


def _names(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[<>=\[; ]", line)[0]) for line in requirements}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
