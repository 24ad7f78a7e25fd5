"""A parameter's matrices, the ranks that hold pieces of each, and the rank that orthogonalises each. No torch.

    parameter  --boxes-->  matrices  --assign-->  owner and round of each  --piece-->  what each rank holds of it

A matrix is a box of its parameter: one part of a packed matrix, one expert of a stack. For each dimension of the
parameter a rank holds some runs of rows: one run under FSDP or tensor parallel, several if a packed matrix is divided
part by part. Its piece of a matrix is the intersection of runs and box, and is one block of its local tensor.

Memory of an update, besides the states: see `update_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from trainer.model.roles import Matrices

Run = tuple[int, int]
"""Begin and end along one dimension."""
Box = tuple[Run, ...]
BUCKET_BYTES = 256 * 2**20
BATCH_ELEMENTS = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One mesh axis divides one dimension of a parameter.

    size: number of ranks of the axis.
    at: this rank's index among them.
    blocks: number of equal blocks of the dimension, each divided separately.
    """

    dim: int
    size: int
    at: int
    blocks: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One rank's piece of one matrix: a block of its local tensor, and the position of its runs in the matrix.

    local: per dimension, begin and length in the local tensor.
    runs: per dimension, begin and end in the box, in the order of the local tensor.
    """

    local: tuple[tuple[int, int], ...]
    runs: tuple[tuple[Run, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(length for _, length in self.local)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def blocks(self) -> Iterable[tuple[Box, Box]]:
        """Pairs of boxes with the same content: one of the piece, one of the matrix."""
        sides = [list(_places(runs)) for runs in self.runs]
        for chosen in product(*sides):
            yield tuple(inside for inside, _ in chosen), tuple(outside for _, outside in chosen)


def boxes(shape: Sequence[int], matrices: Matrices) -> list[Box]:
    """The matrices of a parameter. Raises ValueError if the description does not fit the shape."""
    if len(shape) != (3 if matrices.stacked else 2):
        raise ValueError(f"a {len(shape)}-D parameter of shape {tuple(shape)} is no {matrices}")
    parts = matrices.parts or (shape[matrices.dim],)
    if sum(parts) != shape[matrices.dim] or (not len(shape) - 2 <= matrices.dim < len(shape) and matrices.parts):
        raise ValueError(f"{matrices} does not divide a parameter of shape {tuple(shape)}")
    sides = [[(0, length)] for length in shape]
    if matrices.stacked:
        sides[0] = [(expert, expert + 1) for expert in range(shape[0])]
    if matrices.parts:
        ends = [sum(parts[: number + 1]) for number in range(len(parts))]
        sides[matrices.dim] = list(zip([0, *ends], ends, strict=False))
    return list(product(*sides))


def runs_held(shape: Sequence[int], cuts: Iterable[Cut]) -> list[list[Run]]:
    """A rank's runs along each dimension. cuts: in the order of division."""
    held = [[(0, length)] for length in shape]
    for cut in cuts:
        held[cut.dim] = _cut(held[cut.dim], cut)
    return held


def piece_of(held: Sequence[Sequence[Run]], box: Box) -> Piece | None:
    """The piece of a matrix that a rank with these runs holds, None for nothing."""
    local, inside = [], []
    for runs, (begin, end) in zip(held, box, strict=True):
        before, start, found = 0, 0, []
        for first, last in runs:
            low, high = max(first, begin), min(last, end)
            if low < high:
                start = start if found else before + low - first
                found.append((low - begin, high - begin))
            before += last - first
        if not found:
            return None
        local.append((start, sum(high - low for low, high in found)))
        inside.append(tuple(found))
    return Piece(local=tuple(local), runs=tuple(inside))


def flops(shape: Sequence[int], steps: int) -> int:
    """FLOPs of the iteration on one matrix: A = X X^T and its product with X take 4 m^2 n, A A takes 2 m^3."""
    short, long = sorted(shape[-2:])
    return steps * (4 * short**2 * long + 2 * short**3)


def iteration_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Elements at the peak of one step on one matrix: the old and the new X, A, and b A + c A A."""
    short, long = sorted(shape[-2:])
    return itemsize * (2 * short * long + 2 * short**2)


def adjusted(shape: Sequence[int], adjust_lr: str, *, transposed: bool = False) -> float:
    """Multiplier of one matrix's learning rate.

    original: Jordan's sqrt(max(1, out / in)).
    match_rms_adamw: 0.2 sqrt(max(out, in)). An update then has the root mean square of AdamW's, and learning rate and
    decay can be AdamW's (Liu et al. 2025, Moonlight, arXiv:2502.16982).
    """
    rows, columns = reversed(shape[-2:]) if transposed else shape[-2:]
    if adjust_lr == "original":
        return math.sqrt(max(1, rows / columns))
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    raise ValueError(f"adjust_lr={adjust_lr}: use original or match_rms_adamw")


def assign(work: Sequence[int], sizes: Sequence[int], owners: int, limit: int) -> list[list[list[int]]]:
    """Rounds of matrices for each owner: [round][owner] -> indices of matrices.

    The heaviest matrix first, always to the owner with the least work (Graham 1969: at most 4/3 of the optimum). A
    round ends for an owner before its matrices exceed `limit`, and holds at least one.
    """
    load, rounds = [0] * owners, [[[] for _ in range(owners)]] if work else []
    place, used = [0] * owners, [0] * owners
    for number in sorted(range(len(work)), key=lambda number: (-work[number], number)):
        owner = min(range(owners), key=lambda owner: (load[owner], owner))
        load[owner] += work[number]
        if used[owner] and used[owner] + sizes[number] > limit:
            place[owner] += 1
            used[owner] = 0
        used[owner] += sizes[number]
        while len(rounds) <= place[owner]:
            rounds.append([[] for _ in range(owners)])
        rounds[place[owner]][owner].append(number)
    return rounds


def batches(numbers: Iterable[int], kind_of: Sequence[object], numel_of: Sequence[int]) -> list[list[int]]:
    """Matrices of one kind that are iterated in one batch, of at most BATCH_ELEMENTS elements."""
    found: list[list[int]] = []
    open_: dict[object, list[int]] = {}
    for number in numbers:
        batch = open_.get(kind_of[number])
        if batch is None or (len(batch) + 1) * numel_of[number] > BATCH_ELEMENTS:
            open_[kind_of[number]] = batch = []
            found.append(batch)
        batch.append(number)
    return found


def update_bytes(
    shapes: Sequence[Sequence[int]],
    *,
    steps: int,
    itemsize: int,
    sent_itemsize: int | None = None,
    ranks: int = 1,
    replicas: int = 1,
    bucket_bytes: int = BUCKET_BYTES,
) -> int:
    """Bytes that an update allocates on the busiest rank, besides the states, for matrices of these shapes.

    itemsize: of the iteration's dtype.
    sent_itemsize: of the messages' dtype: the parameters', if that is narrower.
    ranks: number of ranks that share each matrix (dp_shard x cp x tp).
    replicas: number of copies of these.

    A round has three parts: this rank's pieces of all matrices, 1 / ranks of them; the matrices that the rank owns; the
    temporaries of the largest batch, or the pieces that replicas exchange. Exact if everything divides evenly.
    """
    numel = [math.prod(shape[-2:]) for shape in shapes]
    kinds = [tuple(shape[-2:]) for shape in shapes]
    sizes = [(sent_itemsize or itemsize) * count for count in numel]
    rounds = assign([flops(shape, steps) for shape in shapes], sizes, ranks * replicas, bucket_bytes // replicas)
    peak = 0
    for round_ in rounds:
        cells = [round_[first : first + ranks] for first in range(0, len(round_), ranks)]
        pieces = max(-(-sum(sizes[number] for owned in cell for number in owned) // ranks) for cell in cells)
        exchanged = replicas * pieces if replicas > 1 else 0
        for owned in round_:
            work = [len(batch) * iteration_bytes(kinds[batch[0]], itemsize) for batch in batches(owned, kinds, numel)]
            gathered = sum(sizes[number] for number in owned) if ranks > 1 else 0
            peak = max(peak, pieces + gathered + max(exchanged, max(work, default=0)))
    return peak


def _places(runs: Sequence[Run]) -> Iterable[tuple[Run, Run]]:
    """Each run, with its position in the piece and in the matrix."""
    before = 0
    for begin, end in runs:
        yield (before, before + end - begin), (begin, end)
        before += end - begin


def _cut(runs: Sequence[Run], cut: Cut) -> list[Run]:
    """torch.chunk's rule: all but the last chunks are equal, and the last ones may be empty."""
    total = sum(end - begin for begin, end in runs)
    chunk = -(-total // (cut.size * cut.blocks))
    kept: list[Run] = []
    for block in range(cut.blocks):
        first = (block * cut.size + cut.at) * chunk
        kept += _between(runs, first, first + chunk)
    return kept


def _between(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """The elements at positions first to last of the concatenated runs."""
    kept, before = [], 0
    for begin, end in runs:
        low, high = max(first - before, 0), min(last - before, end - begin)
        if low < high:
            kept.append((begin + low, begin + high))
        before += end - begin
    return kept
