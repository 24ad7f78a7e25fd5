"""What a StorageTracker has seen, as a curve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainer.estimate.tracker import Alive, Event, Mark


def balance(events: Iterable[Event]) -> Iterator[tuple[str, int]]:
    """Bytes alive after each event, with the name of a mark ("" for the others)."""
    alive = Alive()
    for event in events:
        alive.count(event)
        yield (event.name if isinstance(event, Mark) else ""), alive.total
