"""The shapes of one architecture as one trace, whose sizes are polynomials of micro-batch b and sequence length s.

    asked for        (2, 4096)      traced, and with it
    the ends         (2, 128)       of the range in which the model's code takes the same branches: one micro-batch size
                     (7, 131072)    more than 1, lengths between two limits that the model's config names

Each storage holds c * b^i * s^j bytes, or the sum of two such terms. Two traces say which, the third must agree to the
byte, and all three must have the same events; where they do not, shapes are traced one by one, as without a family.
Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache, partial
from itertools import combinations, product
from typing import Any

from trainer.estimate.profile import Part, Trace, part_from_json, part_to_json

STEP = 64
"""Lengths of a family are its multiples: heads, slices and tensor-parallel ranks divide them."""
LEAST, MOST = 2 * STEP, 2**20
LIMIT = re.compile("window|chunk|block|position|length|ctx|context|max_seq")
"""Settings of a model's config at which its code may take another branch."""

Point = tuple[int, int]
"""Micro-batch size, sequence length."""
Term = tuple[int, int, int, int]
"""Numerator and denominator of the coefficient, power of the micro-batch size, of the sequence length."""
POWERS = tuple(product((0, 1), (0, 1, 2)))
PAIRS = tuple((i, two) for i in (0, 1) for two in combinations((0, 1, 2), 2))


def limits(value: object, name: str = "") -> Iterator[int]:
    """Lengths in a model's config."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from limits(each, str(key))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from limits(each, name)
    elif isinstance(value, int) and not isinstance(value, bool) and LIMIT.search(name):
        yield value


class Unlike(Exception):
    """A shape's trace has far more steps than that of the shape asked for: its code loops over the sequence."""


def most_births(part: Part) -> int:
    """Of storages in another shape's trace, before it is broken off. Code that copies what has several sequences makes
    some more of them; a loop over the longest sequence would take minutes."""
    return 2 * sum(step[0] == "+" for steps in part.trace.sections.values() for step in steps)


def families(
    asked: Point, borders: Sequence[int], trace: Callable[[Point], Part], *, upwards: bool
) -> list[dict[str, Any]]:
    """Families around a shape, as JSON; none where its neighbours are not alike. trace: may raise Unlike. upwards: only
    larger shapes are alike, because the loss's slices are as many as fit.

    Code often skips a copy of what has one sequence: where one family does not hold all, it and larger micro-batches
    have one each.
    """
    batch, length = asked
    low = max([border for border in borders if border < length], default=0)
    high = min([border for border in borders if border >= length], default=MOST)
    first = length if upwards else max(LEAST, low // STEP * STEP + STEP)
    last = high // STEP * STEP
    if length % STEP or length < LEAST or last - first < 4 * STEP:
        return []
    middle = (first + last) // (2 * STEP) * STEP
    lengths = [one for one in (first, last, middle, middle + STEP) if one != length][:2]
    small, large = max(2, batch) if upwards else 2, max(7, batch + 5)
    known = cache(trace)
    ones = [(1, one) for one in lengths]
    several = [(small, lengths[0]), (large, lengths[1])]
    if upwards and batch > 1:
        larger = fit([asked, *several], known)
        return [larger] if larger else []
    together = fit([asked, several[0] if batch == 1 else ones[0], several[1]], known)
    if together is not None:
        return [together]
    third = length if upwards else middle
    one_sequence = [asked if batch == 1 else (1, third), *ones]
    more = [asked if batch > 1 else (3, third), *several]
    found: list[dict[str, Any]] = []
    # Where even shapes of the same micro-batch differ from the one asked for, the others will from each other.
    for places in (one_sequence, more) if batch == 1 else (more, one_sequence):
        if (one := fit(places, known)) is not None:
            found.append(one)
        elif asked in places:
            break
    return found


def fit(places: Sequence[Point], trace: Callable[[Point], Part]) -> dict[str, Any] | None:
    """The family of these shapes; None: they are not alike, which ends the traces."""
    written: list[dict[str, Any]] = []
    sections: list[Any] = []
    for place in places:
        try:
            one = part_to_json(trace(place))
        except Unlike:
            return None
        sections.append(one["trace"].pop("sections"))
        written.append(one)
        if one != written[0] or _outline(sections[-1]) != _outline(sections[0]):
            return None
    found: list[list[Any]] = []
    for same in zip(*sections, strict=True):
        together = [_step(places, steps) for steps in zip(*(one[2] for one in same), strict=True)]
        if None in together:
            return None
        found.append([*same[0][:2], together])
    written[0]["trace"]["sections"] = found
    batches, lengths = [batch for batch, _ in places], [length for _, length in places]
    return {
        "batches": [min(batches), 1 if max(batches) == 1 else None],
        "lengths": [min(lengths), max(lengths)],
        "part": written[0],
    }


def _outline(sections: Sequence[Any]) -> list[tuple[str, str, int]]:
    return [(phase, name, len(steps)) for phase, name, steps in sections]


def covers(family: Mapping[str, Any], asked: Point) -> bool:
    (least, most), (shortest, longest) = family["batches"], family["lengths"]
    batch, length = asked
    inside = shortest <= length <= longest and length % STEP == 0
    return inside and least <= batch and (most is None or batch <= most)


def at(family: Mapping[str, Any], asked: Point) -> Part | None:
    """The part as a trace of this shape would be; None where a size would not be a whole number."""
    part = part_from_json(family["part"])
    sizes = cache(partial(_value, asked))  # most storages are as large as others
    sections = {
        key: tuple(
            (*step[:2], sizes(tuple(map(tuple, step[2]))), step[3]) if step[0] == "+" else step for step in steps
        )
        for key, steps in part.trace.sections.items()
    }
    if any(step[0] == "+" and step[2] is None for steps in sections.values() for step in steps):
        return None
    return Part(part.groups, part.buffers_bytes, Trace(part.trace.templates, sections))


def _value(asked: Point, terms: Sequence[Term]) -> int | None:
    batch, length = asked
    total = sum((Fraction(over, under) * batch**i * length**j for over, under, i, j in terms), Fraction(0))
    return total.numerator if total.denominator == 1 else None


def _step(places: Sequence[Point], steps: Sequence[Sequence[Any]]) -> list[Any] | None:
    """The step of all traces; None where they differ in more than a size."""
    first = steps[0]
    if first[0] != "+":
        return list(first) if all(list(step) == list(first) for step in steps) else None
    if len({(step[0], step[1], step[3]) for step in steps}) > 1:
        return None
    terms = _terms(places, [step[2] for step in steps])
    return None if terms is None else [first[0], first[1], terms, first[3]]


def _terms(places: Sequence[Point], sizes: Sequence[int]) -> list[Term] | None:
    """The shortest polynomial through these sizes."""
    guesses: list[Callable[[], list[Term]]] = [lambda i=i, j=j: _one(places, sizes, i, j) for i, j in POWERS]
    guesses += [lambda i=i, two=two: _two(places, sizes, i, two) for i, two in PAIRS]
    for guess in guesses:
        terms = guess()
        if all(_value(place, terms) == size for place, size in zip(places, sizes, strict=True)):
            return terms
    return None


def _one(places: Sequence[Point], sizes: Sequence[int], i: int, j: int) -> list[Term]:
    (batch, length), size = places[0], sizes[0]
    found = Fraction(size, batch**i * length**j)
    return [(found.numerator, found.denominator, i, j)]


def _two(places: Sequence[Point], sizes: Sequence[int], i: int, powers: tuple[int, int]) -> list[Term]:
    """Through the first two places."""
    (b, s), (c, t) = places[:2]
    low, high = powers
    one, other = Fraction(sizes[0], b**i), Fraction(sizes[1], c**i)
    above = (other * s**low - one * t**low) / (t**high * s**low - s**high * t**low)
    below = (one - above * s**high) / s**low
    return [(value.numerator, value.denominator, i, j) for value, j in ((below, low), (above, high))]
