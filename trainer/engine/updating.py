"""The torch engine of each way to update (`trainer.update`)."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.engine.in_backward import InBackward
from trainer.engine.mezo import Mezo
from trainer.engine.torch import TorchEngine
from trainer.update import after_backward, in_backward, mezo

ENGINES: Mapping[str, type[TorchEngine]] = {
    after_backward.NAME: TorchEngine,
    in_backward.NAME: InBackward,
    mezo.NAME: Mezo,
}
