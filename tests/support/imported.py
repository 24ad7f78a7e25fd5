"""Config files of other trainers for tests, and the experiments imported from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.foreign import Fate
from configs.imports.combine import Imported
from configs.imports.write import experiment
from configs.keys import schema_keys, value_at
from configs.load import load_config, usual

ZERO2 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": False,
        "reduce_bucket_size": 5e6,
        "round_robin_gradients": True,
    },
}
ARGUMENTS = {
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": "2e-5",
    "max_steps": 200,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "gradient_checkpointing": True,
    "deepspeed": "ds.json",
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": 5,
    "full_determinism": True,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 10,
    "report_to": ["none"],
    "dataloader_pin_memory": True,
}
FSDP = {"distributed_type": "FSDP", "num_processes": 2, "mixed_precision": "bf16"}


def written(folder: Path, **files: Any) -> list[str]:
    """Write the files and return their paths. Values become JSON (which is also YAML); text is written as it is."""
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
