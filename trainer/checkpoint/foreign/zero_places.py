"""Positions of a parameter in ZeRO's flat rows: pure functions, without a file.

Every rank keeps one row per group: one for the master weights, and one of the same length for each optimizer state.

    stages 1 and 2   a group's parameters lie one after another in a row over all ranks, cut into W equal pieces. A
                     parameter may cross from one rank to the next, and most ranks know nothing of it. Each rank says
                     which part of its piece belongs to whom (`param_slice_mappings`)
    stage 3          every parameter is cut into W pieces of one length, the last filled up with padding; a rank's row
                     has its pieces in the order of `param_shapes`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of one rank's row."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter: the index of its row, and its pieces, in order."""

    shape: Shape
    row: int
    pieces: tuple[Piece, ...]


class Misplaced(Exception):
    """The mismatch, as the rest of a line."""


def from_slices(
    slices: Sequence[Sequence[Mapping[str, tuple[int, int]]]], shapes: Mapping[str, Shape]
) -> dict[str, Place]:
    """Stages 1 and 2. slices: per rank and row, {name: (start, length)}. Raises Misplaced if pieces are missing."""
    found: dict[str, tuple[int, list[Piece]]] = {}
    for rank, rows in enumerate(slices):
        for row, named in enumerate(rows):
            for name, (start, length) in named.items():
                found.setdefault(name, (row, []))[1].append(Piece(rank, start, length))
    places: dict[str, Place] = {}
    for name, shape in shapes.items():
        row, pieces = found.pop(name, (0, []))
        held = sum(piece.length for piece in pieces)
        if held != prod(shape):
            raise Misplaced(f"has {held} elements of {name}, whose shape {list(shape)} has {prod(shape)}")
        places[name] = Place(shape, row, tuple(pieces))
    if found:
        raise Misplaced(f"has elements of {next(iter(found))}, of which it does not have the shape")
    return places


def from_partitions(shapes: Sequence[Mapping[str, Shape]], ranks: int) -> dict[str, Place]:
    """Stage 3. shapes: of the parameters of each row, in order."""
    places: dict[str, Place] = {}
    for row, named in enumerate(shapes):
        start = 0
        for name, shape in named.items():
            places[name] = Place(shape, row, partition(prod(shape), ranks, start))
            start += -(-prod(shape) // ranks)
    return places


def partition(elements: int, ranks: int, start: int = 0) -> tuple[Piece, ...]:
    """The pieces of one parameter under stage 3, without the padding of the last ones."""
    length = -(-elements // ranks)
    lengths = [min(length, max(0, elements - rank * length)) for rank in range(ranks)]
    return tuple(Piece(rank, start, length) for rank, length in enumerate(lengths) if length)


def needed(places: Mapping[str, Place]) -> dict[tuple[int, int], int]:
    """Minimum number of elements in each row: {(rank, row): elements}."""
    lengths: dict[tuple[int, int], int] = {}
    for place in places.values():
        for piece in place.pieces:
            at = piece.rank, place.row
            lengths[at] = max(lengths.get(at, 0), piece.start + piece.length)
    return lengths
