"""Files of other trainers for a test, and the experiments that come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.foreign import Fate
from configs.imports.combine import Imported
from configs.imports.write import experiment
from configs.keys import schema_keys, value_at
from configs.load import load_config, usual


def written(folder: Path, **files: Any) -> list[str]:
    """Files with their values, as JSON (YAML reads it too) or as the text that they are."""
    for name, tree in files.items():
        path = folder / name.replace("_json", ".json").replace("_yaml", ".yaml").replace("_toml", ".toml")
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return [
        str(folder / name.replace("_json", ".json").replace("_yaml", ".yaml").replace("_toml", ".toml"))
        for name in files
    ]


def names(made: Imported, fate: Fate) -> set[str]:
    return {each.name for each in made.of(fate)}


def experiment_of(made: Imported, folder: Path) -> dict[str, Any]:
    """The keys of the written experiment that differ from our defaults, after Hydra has composed it."""
    (folder / "mine/experiment").mkdir(parents=True, exist_ok=True)
    (folder / "mine/experiment/it.yaml").write_text(experiment(made, "command"))
    config = load_config(["experiment=it"], config_dir=str(folder / "mine"))
    before, _ = usual()
    return {key: value for key in schema_keys() if (value := value_at(config, key)) != value_at(before, key)}
