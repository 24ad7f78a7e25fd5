"""All ranks prepare their data, and all of them succeed or all of them fail, with the same message.

Otherwise a missing file on one node would leave the others waiting in a collective until its timeout. The ranks
communicate over their own gloo group: tokenising a large corpus for the first time takes longer than any sensible
timeout of the training's collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self, TypeVar

import torch.distributed as dist

from configs.errors import DataError
from trainer.process.runtime import gather

T = TypeVar("T")

PATIENCE = timedelta(days=7)


class Agreement:
    """Used as a context by every rank at the same point. Does nothing in a process without a process group."""

    def __enter__(self) -> Self:
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        group = None if alone else dist.new_group(backend="gloo", timeout=PATIENCE)
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when every rank has. If any raised a DataError in it, all raise the first one's problems."""
        problems: tuple[str, ...] = ()
        try:
            yield
        except DataError as error:
            problems = error.problems
        for rank, theirs in enumerate(self._gather(problems)):
            if theirs:
                where = f"rank {rank}: " if rank else ""
                raise DataError(*(where + problem for problem in theirs))

    def check_equal(self, fingerprint: str) -> None:
        """Raise DataError unless all ranks have the same data."""
        everyones = self._gather(fingerprint)
        other = next((rank for rank, theirs in enumerate(everyones) if theirs != everyones[0]), None)
        if other is not None:
            raise DataError(
                f"data: rank {other} has other text than rank 0, and their steps would not fit together; give every"
                " node the same files (same content and order), or one folder that all of them share"
            )

    def _gather(self, mine: T) -> list[T]:
        return [mine] if self._group is None else gather(mine, self._group)
