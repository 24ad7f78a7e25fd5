"""FSDP as accelerate and transformers name it, both versions, in our keys."""

from __future__ import annotations

from typing import Any

from configs.imports.fields import Field, Source, Unreadable

# Version 1 numbers its strategies.
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")


def strategy(source: Source, name: str, value: Any, gpus_per_node: Any) -> Field:
    """A strategy of version 1, by name or number. gpus_per_node: from the file, else None."""
    text = str(value).upper()
    text = STRATEGIES[int(text) - 1] if text in ("1", "2", "3", "4", "5") else text
    if text == "NO_SHARD":
        return source.translated(name, value, {"parallel.dp_replicate": None, "parallel.dp_shard": 1})
    if text not in STRATEGIES:
        raise Unreadable(f"choose {', '.join(STRATEGIES)}")
    settings: dict[str, Any] = {"parallel.reshard_after_forward": text in ("FULL_SHARD", "HYBRID_SHARD")}
    if not text.startswith("HYBRID"):
        return _over_all(source.translated(name, value, settings | {"parallel.dp_shard": None}))
    if not isinstance(gpus_per_node, int):
        return source.lost(
            name,
            value,
            "the size of a group is not in this file; give parallel.dp_shard=GPUS_PER_NODE"
            " parallel.dp_replicate=NODES, else parameters are sharded over all ranks",
        )
    return source.translated(
        name, value, settings | {"parallel.dp_replicate": None, "parallel.dp_shard": gpus_per_node}
    )


def reshard(source: Source, name: str, value: Any, gpus_per_node: Any) -> Field:
    """Version 2's bool, or version 1's strategy under the newer name."""
    if str(value).lower() in ("true", "false"):
        on = str(value).lower() == "true"
        settings = {"parallel.dp_shard": None, "parallel.reshard_after_forward": on}
        return _over_all(source.translated(name, value, settings))
    return strategy(source, name, value, gpus_per_node)


def _over_all(found: Field) -> Field:
    """Sharded over all available ranks, unless ParallelismConfig gives their number."""
    found.implied = frozenset(["parallel.dp_shard"])
    return found
