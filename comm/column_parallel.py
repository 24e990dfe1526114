"""Products that the ranks of a node share out: each makes some of the columns, for the rows of all.

A rank then reads its part of a weight instead of all of it, which is what a product of few rows takes its time for.
T rows of this rank, K numbers of a row, N columns of a result, R ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.handshake import Tag, handshake
from xpar.comm.partition import split_range
from xpar.comm.shared_window import window_of

ROUND_BYTES = 16 * 2**20
"""Of rows and results that lie in the node's shared window at a time."""


@dataclass(frozen=True)
class ColumnSlice:
    """A product of N = ``outputs`` columns, of which this rank makes ``columns``.

    ``compute``: rows [T', K] of any ranks to [T', columns]; not called where ``columns`` is empty, or with no rows.
    """

    outputs: int
    columns: slice
    compute: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WindowLayout:
    """Where a round lies in the window: first ``rows`` rows for each rank, from byte ``results_at`` on what came of them.

    ``reserved``: it fits into what is always there, rows where no results ever lie: rows may then be written while
    others still read the results before.
    """

    size: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    rows: int
    reserved: bool

    @classmethod
    def of(cls, size: int, inputs: int, outputs: int, dtype: torch.dtype) -> "WindowLayout":
        """As many rows a round as the window has room for; one, if it has none."""
        room_of_rows, room_of_results = _rooms()
        all_inputs, all_outputs = (size * n * dtype.itemsize for n in (inputs, outputs))
        rows = min(room_of_rows // all_inputs, room_of_results // all_outputs)
        return cls(size, inputs, outputs, dtype, max(1, rows), rows > 0)

    @property
    def results_at(self) -> int:
        return max(_rooms()[0], self.size * self.rows * self.inputs * self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.results_at + self.size * self.rows * self.outputs * self.dtype.itemsize


class ColumnParallel:
    """Every rank of ``group``, whose ranks share memory, calls :meth:`products` together, those without rows too.

    Collective over the group; raises :class:`~xpar.comm.failure.AgreedError` if the node has no room for its window.
    """

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self._window = window_of(group, "columns")  # nobody else writes there between two products
        self._window.reserve(ROUND_BYTES)

    def products(self, x: Tensor, shares: Sequence[ColumnSlice], tag: Tag) -> list[Tensor]:
        """[T, N] of each of ``shares``: what the ranks' ``compute`` make of ``x`` [T, K], each its own columns of it.

        One agreement, and one fence a round. The agreement says how many rows each rank has, that they are there,
        and that everybody has read the last results, so that new ones may be written.
        """
        outputs = sum(s.outputs for s in shares)
        places = WindowLayout.of(self.group.size, x.shape[1], outputs, x.dtype)
        if places.reserved:
            self._put(x, places)
            self._window.sync()
        facts = {"inputs": x.shape[1], "outputs": outputs, "bytes": x.element_size()}
        table = handshake(self.group, tag, same=facts, values=(x.shape[0],))
        counts = [int(n) for n in table[:, 0]]
        self._window.sync()
        self._window.reserve(places.nbytes)
        out = [x.new_empty(x.shape[0], s.outputs) for s in shares]
        for first in range(0, max(counts), places.rows):
            here = slice(first, first + places.rows)
            if first or not places.reserved:
                self._put(x[here], places)
                self._window.fence()
            parts = [max(0, min(places.rows, count - first)) for count in counts]
            self._round([o[here] for o in out], parts, shares, places)
        return out

    def _put(self, x: Tensor, places: WindowLayout) -> None:
        """This rank's rows of a round to where they belong."""
        if x.shape[0]:
            own = x[: places.rows]
            self._slots(places)[self.group.rank, : own.shape[0]] = own

    def _slots(self, places: WindowLayout) -> Tensor:
        """[R, rows, K]: the places of all ranks' rows."""
        rows = self._window.view(0, (places.size * places.rows, places.inputs), places.dtype)
        return rows.view(places.size, places.rows, places.inputs)

    def _round(
        self, out: Sequence[Tensor], parts: Sequence[int], shares: Sequence[ColumnSlice], places: WindowLayout
    ) -> None:
        """Of the rows of all ranks, ``parts`` of each, this rank's columns; and its rows of all columns to ``out``."""
        slots, rank = self._slots(places), self.group.rank
        given = [slots[r, :n] for r, n in enumerate(parts) if n]
        rows = given[0] if len(given) == 1 else torch.cat(given)
        results = self._window.view(places.results_at, (sum(parts), places.outputs), places.dtype)
        pieces = torch.split(results, [s.outputs for s in shares], dim=1)
        for piece, part in zip(pieces, shares, strict=True):
            if part.columns.start < part.columns.stop:
                piece[:, part.columns] = part.compute(rows)
        self._window.fence()
        first = sum(parts[:rank])
        for own, piece in zip(out, pieces, strict=True):
            own.copy_(piece[first : first + parts[rank]])


def build_column_parallel(outputs: int, group: Communicator, unit: int = 64) -> slice:
    """This rank's columns of ``outputs``: as many whole ``unit`` as the others' or one more; possibly none."""
    units = split_range(-(-outputs // unit), group.size, group.rank)
    return slice(min(outputs, units.start * unit), min(outputs, units.stop * unit))


def _rooms() -> tuple[int, int]:
    """Bytes of a window that are always there: for rows, and for results, which often are of several products."""
    rows = ROUND_BYTES // 4 // 64 * 64
    return rows, ROUND_BYTES - rows
