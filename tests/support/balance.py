"""The events of a StorageTracker as a curve of live bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainer.estimate.tracker import Alive, Event, Mark


def balance(events: Iterable[Event]) -> Iterator[tuple[str, int]]:
    """Yield for each event the name of its mark ("" if it is no mark) and the bytes alive after it."""
    alive = Alive()
    for event in events:
        alive.count(event)
        yield (event.name if isinstance(event, Mark) else ""), alive.total
