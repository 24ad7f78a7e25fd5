"""Sends matrices to their owners and updates back, however the parameters are divided.

    rank 0   [A0|B0|C0|D0]                       A = A0 A1  --iterate--> A'                      [A0'|B0'|C0'|D0']
                             --all-to-all-->     B = B0 B1                   --all-to-all-->
    rank 1   [A1|B1|C1|D1]                       C, D on rank 1                                  [A1'|B1'|C1'|D1']

The ranks that share one copy of the parameters (dp_shard, cp, tp) are a cell. Matrices are distributed over all ranks
of all cells. Each cell gathers those of its own ranks, so a round takes two collectives of the cell; if there are
several cells (dp_replicate, DDP), one more all-gather passes the updates to the other cells. A cell of one rank has
everything
already: DDP needs only the all-gather, one process nothing.

Bytes that one rank sends in a step, P bytes of matrices in the dtype of the iteration, S ranks in a cell, R cells:
2 P / (R S) to and from owners, (R - 1) P / (R S) to other cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from trainer.optim.muon.owners import Box, Cut, Piece, assign, batches, flops, piece_of, runs_held

# Renamed in torch 2.13; the old name warns.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A parameter's placement on the mesh. placements: of all axes; none for a plain tensor."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One matrix.

    parameter: index in the list that the callers of `Fleet.run` hold.
    group: index of its param group; matrices of one batch share it.
    transposed: stored [in, out].
    """

    parameter: int
    group: int
    placed: Placed
    box: Box
    steps: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = (end - begin for begin, end in self.box[-2:])
        return rows, columns

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A piece of a matrix in a buffer."""

    job: int
    piece: Piece
    offset: int

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.offset : self.offset + self.piece.numel].view(self.piece.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Contents of a buffer, in order, and the number of its elements for each rank of the cell."""

    entries: list[Entry]
    splits: list[int]

    @property
    def total(self) -> int:
        return sum(self.splits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """This rank's work in one round.

    batches: the matrices it owns. sent, gathered: to and at the owners. updated, landed: at the owners and back.
    elsewhere: results for the ranks with this index in each cell, including this one.
    """

    batches: list[list[int]]
    sent: Layout
    gathered: Layout
    updated: Layout
    elsewhere: list[Layout]

    @property
    def padded(self) -> int:
        return max(layout.total for layout in self.elsewhere)


class Cells:
    """This rank's place among the ranks that hold some parameters.

    sizes: of the axes that make up a cell. axes: their indices in the mesh.
    groups: process groups of cells that several axes make up, made once.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None,
        placements: Iterable[tuple[Placement, ...]],
        replicas: Any,
        groups: dict[tuple[int, ...], Any],
    ) -> None:
        self.group: Any = None
        self.others = replicas
        self.axes: list[int] = []
        self.mesh_sizes: tuple[int, ...] = () if mesh is None else tuple(mesh.shape)
        self.place = 0
        self.device: torch.device | None = None
        if mesh is not None:
            self._from(mesh, list(placements), groups)
        self.sizes = tuple(self.mesh_sizes[axis] for axis in self.axes)
        self.ranks = math.prod(self.sizes)
        self.count = 1 if self.others is None else dist.get_world_size(self.others)
        self.cell = 0 if self.others is None else dist.get_rank(self.others)

    def _from(self, mesh: DeviceMesh, placements: list[tuple[Placement, ...]], groups: dict[Any, Any]) -> None:
        """The outermost axis that divides none of the parameters numbers the cells; the other axes make up a cell."""
        self.device = torch.device(mesh.device_type)
        axes = [axis for axis, size in enumerate(self.mesh_sizes) if size > 1]
        if self.others is None:
            whole = [axis for axis in axes if all(placed[axis].is_replicate() for placed in placements)]
            if whole:
                self.others = mesh.get_group(whole[0])
                axes.remove(whole[0])
        self.axes = axes
        here = mesh.get_coordinate()
        assert here is not None, "this rank holds no piece of its own parameters"
        index = tuple(slice(None) if axis in axes else at for axis, at in enumerate(here))
        ranks = mesh.mesh[index].flatten().tolist()
        self.place = ranks.index(dist.get_rank())
        if len(axes) == 1:
            self.group = mesh.get_group(axes[0])
        elif axes:
            assert ranks == sorted(ranks), "process groups number their ranks in ascending order"
            if tuple(ranks) not in groups:
                groups[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
            self.group = groups[tuple(ranks)]

    def coordinates(self, place: int) -> dict[int, int]:
        """{axis of the mesh: index on it} of one rank of the cell."""
        found: dict[int, int] = {}
        for axis, size in reversed(list(zip(self.axes, self.sizes, strict=True))):
            place, found[axis] = divmod(place, size)
        return found

    def sends(self, placed: Placed, place: int, owner: int) -> bool:
        """Among the ranks that hold the same piece, the one on the owner's side sends it."""
        here, there = self.coordinates(place), self.coordinates(owner)
        return all(here[axis] == there[axis] for axis in self.axes if placed.placements[axis].is_replicate())

    def cuts(self, placed: Placed, place: int) -> list[Cut]:
        """In the order of division: outer axes first, but FSDP divides what tensor parallel has left.

        FSDP2 marks that by a strided placement on the outer axis. The stride shows only the order; the division is
        plain.
        """
        at, first, last = self.coordinates(place), [], []
        for axis in self.axes:
            placement = placed.placements[axis]
            if placement.is_replicate():
                continue
            if not isinstance(placement, (Shard, _StridedShard)):
                raise ValueError(f"a parameter of shape {placed.shape} is placed as {placed.placements}")
            dim = placement.dim % len(placed.shape)
            strided = isinstance(placement, _StridedShard)
            inner = (placed.placements[other] for other in self.axes if other > axis)
            deferred = strided and any(getattr(other, "dim", None) == placement.dim for other in inner)
            blocks = int(placement.split_factor) if strided and not deferred else 1
            cut = Cut(dim=dim, size=self.mesh_sizes[axis], at=at[axis], blocks=blocks)
            (last if deferred else first).append(cut)
        return [*first, *reversed(last)]


class Fleet:
    """Matrices over the same ranks, assigned to their owners in rounds.

    wire: dtype of the messages: the iteration's or the parameters', whichever is narrower.
    """

    def __init__(
        self, cells: Cells, jobs: Sequence[Job], *, wire: torch.dtype, device: torch.device, bucket_bytes: int
    ) -> None:
        self.cells, self.jobs, self.wire, self.device = cells, jobs, wire, cells.device or device
        self._held: dict[Any, Any] = {}
        sizes = [job.numel * wire.itemsize for job in jobs]
        work = [flops(job.shape, job.steps) for job in jobs]
        dealt = assign(work, sizes, cells.ranks * cells.count, bucket_bytes // cells.count)
        self.rounds = [self._round(owned) for owned in dealt]

    def run(
        self,
        fill: Callable[[Job, Piece, torch.Tensor], None],
        iterate: Callable[[int, torch.Tensor], torch.Tensor],
        dtypes: Sequence[torch.dtype],
        apply: Callable[[Job, Piece, torch.Tensor], None],
    ) -> None:
        """All rounds.

        fill: writes this rank's piece of a matrix to be orthogonalised.
        iterate: orthogonalises a batch [k, m, n] or a matrix of param group number i. dtypes: of each group.
        apply: receives this rank's piece of an update.
        """
        for round_ in self.rounds:
            self._run(round_, fill, iterate, dtypes, apply)

    def _run(self, round_: Round, fill: Any, iterate: Any, dtypes: Sequence[torch.dtype], apply: Any) -> None:
        """A separate function, so that a round's buffers are free before the next round."""
        landed = self._return(round_, *self._compute(round_, *self._collect(round_, fill), iterate, dtypes))
        for layout, buffer in zip(round_.elsewhere, landed, strict=True):
            for entry in layout.entries:
                apply(self.jobs[entry.job], entry.piece, entry.of(buffer))

    def _collect(
        self, round_: Round, fill: Callable[[Job, Piece, torch.Tensor], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's pieces, later overwritten by their updates, and the pieces of its own matrices."""
        pieces = self._empty(max(round_.sent.total, round_.padded))
        for entry in round_.sent.entries:
            fill(self.jobs[entry.job], entry.piece, entry.of(pieces))
        if self.cells.ranks == 1:
            return pieces, pieces
        gathered = self._empty(round_.gathered.total)
        self._all_to_all(gathered, round_.gathered, pieces, round_.sent)
        return pieces, gathered

    def _compute(
        self,
        round_: Round,
        pieces: torch.Tensor,
        gathered: torch.Tensor,
        iterate: Callable[[int, torch.Tensor], torch.Tensor],
        dtypes: Sequence[torch.dtype],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The updates of this rank's matrices, written over the gathered ones if each piece has one holder."""
        same = round_.updated is round_.gathered
        updated = gathered if same else self._empty(round_.updated.total)
        taken, given = _by_job(round_.gathered), _by_job(round_.updated)
        for batch in round_.batches:
            first = self.jobs[batch[0]]
            shape = first.shape if len(batch) == 1 else (len(batch), *first.shape)
            x = torch.empty(shape, dtype=dtypes[first.group], device=self.device)
            for number, matrix in zip(batch, x.view(len(batch), *first.shape), strict=True):
                _copy(taken[number], matrix, gathered, to_matrix=True)
            x = iterate(first.group, x)
            for number, matrix in zip(batch, x.reshape(len(batch), *first.shape), strict=True):
                _copy(given[number], matrix, updated, to_matrix=False)
        return pieces, updated

    def _return(self, round_: Round, pieces: torch.Tensor, updated: torch.Tensor) -> list[torch.Tensor]:
        """This rank's pieces of all updates: a buffer for each cell that owned some."""
        cells = self.cells
        if cells.ranks > 1:
            self._all_to_all(pieces, round_.elsewhere[cells.cell], updated, round_.updated)
        if cells.count == 1:
            return [pieces]
        everything = self._empty(cells.count * round_.padded)
        _gather(everything, pieces[: round_.padded], group=cells.others)
        return list(everything.view(cells.count, round_.padded))

    def _all_to_all(self, into: torch.Tensor, taken: Layout, source: torch.Tensor, given: Layout) -> None:
        dist.all_to_all_single(
            into[: taken.total], source[: given.total], taken.splits, given.splits, group=self.cells.group
        )

    def _empty(self, numel: int) -> torch.Tensor:
        return torch.empty(numel, dtype=self.wire, device=self.device)

    def _round(self, owned: list[list[int]]) -> Round:
        """owned: the matrices of each owner, cell by cell."""
        size, me, cell = self.cells.ranks, self.cells.place, self.cells.cell
        cells = [owned[first : first + size] for first in range(0, len(owned), size)]
        here, mine = cells[cell], cells[cell][me]
        sent = self._layout(
            [[(job, me) for job in here[owner] if self._sends(job, me, owner)] for owner in range(size)]
        )
        gathered = self._layout([[(job, rank) for job in mine if self._sends(job, rank, me)] for rank in range(size)])
        updated = self._layout([[(job, rank) for job in mine] for rank in range(size)])
        kinds = [(job.group, job.shape) for job in self.jobs]
        return Round(
            batches=batches(mine, kinds, [job.numel for job in self.jobs]),
            sent=sent,
            gathered=gathered,
            updated=gathered if updated == gathered else updated,
            elsewhere=[self._layout([[(job, me) for job in jobs] for jobs in cell]) for cell in cells],
        )

    def _layout(self, by_rank: list[list[tuple[int, int]]]) -> Layout:
        """by_rank: for each rank of the cell, the matrices whose pieces it sends or receives, and the holder of the
        piece."""
        entries, splits, offset = [], [], 0
        for wanted in by_rank:
            begin = offset
            for job, holder in wanted:
                piece = self._piece(job, holder)
                if piece is not None:
                    entries.append(Entry(job=job, piece=piece, offset=offset))
                    offset += piece.numel
            splits.append(offset - begin)
        return Layout(entries, splits)

    def _sends(self, job: int, place: int, owner: int) -> bool:
        return self.cells.sends(self.jobs[job].placed, place, owner)

    def _piece(self, job: int, place: int) -> Piece | None:
        placed, box = self.jobs[job].placed, self.jobs[job].box
        key = (placed, place)
        if key not in self._held:
            self._held[key] = runs_held(placed.shape, self.cells.cuts(placed, place))
        if (*key, box) not in self._held:
            self._held[*key, box] = piece_of(self._held[key], box)
        return self._held[*key, box]


def block(tensor: torch.Tensor, box: Iterable[tuple[int, int]]) -> torch.Tensor:
    """View of a tensor. box: begin and length of each dimension."""
    for dim, (begin, length) in enumerate(box):
        tensor = tensor.narrow(dim, begin, length)
    return tensor


def _by_job(layout: Layout) -> dict[int, list[Entry]]:
    ordered = sorted(layout.entries, key=lambda entry: entry.job)
    return {job: list(entries) for job, entries in groupby(ordered, key=lambda entry: entry.job)}


def _copy(entries: list[Entry], matrix: torch.Tensor, buffer: torch.Tensor, *, to_matrix: bool) -> None:
    """Copies between a matrix and its pieces in a buffer."""
    for entry in entries:
        flat = entry.of(buffer)
        for inside, outside in entry.piece.blocks():
            (top, bottom), (left, right) = inside[-2:]
            rows, columns = outside[-2:]
            piece = flat.view(flat.shape[-2:])[top:bottom, left:right]
            whole = matrix[slice(*rows), slice(*columns)]
            if to_matrix:
                whole.copy_(piece)
            else:
                piece.copy_(whole)
