"""Shared by all methods that use peft."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel

from configs.errors import EnvironmentProblem
from trainer.model.roles import INNER

log = logging.getLogger(__name__)
NAME = "default"  # peft's name of the only adapter


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter (`trainer.linear.adapter`) and not to the model."""
    return "lora_" in name


def plain_name(name: str) -> str:
    """A parameter's or module's name in the model without adapters: peft moves an adapted layer one level down."""
    return ".".join(part for part in name.split(".") if part != INNER)


def stored_name(name: str) -> str:
    """A parameter's name in an adapter's file, which omits the adapter's own name: its loader may give it
    another."""
    plain = name.replace(f"lora_magnitude_vector.{NAME}.weight", "lora_magnitude_vector").removesuffix(f".{NAME}")
    return f"base_model.model.{plain.replace(f'.{NAME}.', '.')}"


def log_trained(model: PreTrainedModel, what: str) -> None:
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (0, 1))
    log.info("%s: %s of %s parameters are trained (%.2f %%)", what, f"{trained:,}", f"{total:,}", 100 * trained / total)


def import_peft(method: str) -> Any:
    """Raises EnvironmentProblem if it is not installed. method: for the message."""
    # peft imports bitsandbytes, which logs missing faster kernels in every process.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError:
        raise EnvironmentProblem(
            f"tuning={method}: needs peft; pip install 'distributed-training-cookbook[tuning]'"
        ) from None
    return peft
