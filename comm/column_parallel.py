"""Matrix products whose columns are divided between the ranks of a node.

A rank then reads its part of a weight instead of all of it, and reading is what a product of few rows takes
time for. ``y = x @ W.T`` is cut as ``W = [W_0; W_1; ...]``: rank r computes ``x @ W_r.T`` for the rows of all
ranks. Letters: T rows of this rank, K inputs, N outputs (columns of the result), R ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.handshake import handshake
from xpar.comm.partition import split_range
from xpar.comm.shared_window import get_window

ROUND_BYTES = 16 * 2**20
"""bytes of the node's shared window that the rows and results of one round may take"""


@dataclass(frozen=True)
class ColumnSlice:
    """A product of N = ``outputs`` columns, of which this rank computes ``columns``, possibly none.

    ``compute`` maps rows [T', K] of any ranks to [T', columns]; never called without rows or without columns.
    """

    outputs: int
    columns: slice
    compute: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WindowLayout:
    """The layout of one round in the window: the ``rows`` of every rank [K], then the results.

    Attributes:
        outputs: Columns of all products together.
        rows: Rows of each rank per round.
        is_reserved: Whether a round fits into the part of the window where results never lie. Rows may then
            be written while other ranks still read the results of the round before.
    """

    size: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    rows: int
    is_reserved: bool

    @classmethod
    def of(cls, size: int, inputs: int, outputs: int, dtype: torch.dtype) -> "WindowLayout":
        """Lay out as many rows per round as the window has room for, but at least one."""
        row_bytes, result_bytes = _window_parts()
        all_inputs, all_outputs = (size * n * dtype.itemsize for n in (inputs, outputs))
        rows = min(row_bytes // all_inputs, result_bytes // all_outputs)
        return cls(size, inputs, outputs, dtype, max(1, rows), rows > 0)

    @property
    def results_at(self) -> int:
        """The first byte of the results."""
        return max(_window_parts()[0], self.size * self.rows * self.inputs * self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """The bytes of a round."""
        return self.results_at + self.size * self.rows * self.outputs * self.dtype.itemsize


class ColumnParallel:
    """Column-parallel products of the ranks of ``group``, which share memory.

    Every rank calls :meth:`products` together with the others, also without rows of its own. Making one is
    collective over the group and raises :class:`~xpar.comm.failure.AgreedError` if the node has no room for
    its window.
    """

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self._window = get_window(group, "columns")  # nothing else writes there between two products
        self._window.reserve(ROUND_BYTES)

    def products(self, x: Tensor, slices: Sequence[ColumnSlice], tag: Tag) -> list[Tensor]:
        """Multiply this rank's rows [T, K] by all columns of several products, [T, N] each; collective.

        It takes one agreement, and one fence per round. The agreement says how many rows each rank has, that
        they have been written, and that every rank has read the last results. ``slices`` have one order on
        every rank.
        """
        outputs = sum(s.outputs for s in slices)
        layout = WindowLayout.of(self.group.size, x.shape[1], outputs, x.dtype)
        if layout.is_reserved:
            self._write_rows(x, layout)
            self._window.sync()
        facts = {"inputs": x.shape[1], "outputs": outputs, "bytes": x.element_size()}
        table = handshake(self.group, tag, same=facts, values=(x.shape[0],))
        counts = [int(n) for n in table[:, 0]]
        self._window.sync()
        self._window.reserve(layout.nbytes)
        out = [x.new_empty(x.shape[0], s.outputs) for s in slices]
        for first in range(0, max(counts), layout.rows):
            rows = slice(first, first + layout.rows)
            if first or not layout.is_reserved:
                self._write_rows(x[rows], layout)
                self._window.fence()
            rows_per_rank = [max(0, min(layout.rows, count - first)) for count in counts]
            self._multiply_round([o[rows] for o in out], rows_per_rank, slices, layout)
        return out

    def _write_rows(self, x: Tensor, layout: WindowLayout) -> None:
        """Write this rank's first rows of ``x`` [T, K], one round's, to the window."""
        if x.shape[0]:
            rows = x[: layout.rows]
            self._rows_of_ranks(layout)[self.group.rank, : rows.shape[0]] = rows

    def _rows_of_ranks(self, layout: WindowLayout) -> Tensor:
        """Return the part of the window for all ranks' rows, [R, rows, K]."""
        rows = self._window.view(0, (layout.size * layout.rows, layout.inputs), layout.dtype)
        return rows.view(layout.size, layout.rows, layout.inputs)

    def _multiply_round(
        self,
        out: Sequence[Tensor],
        rows_per_rank: Sequence[int],
        slices: Sequence[ColumnSlice],
        layout: WindowLayout,
    ) -> None:
        """Multiply one round of rows; collective.

        Every rank computes its own columns for all rows, then copies all columns of its own rows to ``out``.
        """
        shared, rank = self._rows_of_ranks(layout), self.group.rank
        parts = [shared[r, :n] for r, n in enumerate(rows_per_rank) if n]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        results = self._window.view(layout.results_at, (sum(rows_per_rank), layout.outputs), layout.dtype)
        products = torch.split(results, [s.outputs for s in slices], dim=1)
        for product, part in zip(products, slices, strict=True):
            if part.columns.start < part.columns.stop:
                product[:, part.columns] = part.compute(rows)
        self._window.fence()
        first = sum(rows_per_rank[:rank])
        for target, product in zip(out, products, strict=True):
            target.copy_(product[first : first + rows_per_rank[rank]])


def split_columns(outputs: int, group: Communicator, unit: int = 64) -> slice:
    """Return this rank's columns of ``outputs``, a multiple of ``unit`` but for the last; or none."""
    units = split_range(-(-outputs // unit), group.size, group.rank)
    return slice(min(outputs, units.start * unit), min(outputs, units.stop * unit))


def _window_parts() -> tuple[int, int]:
    """Return the bytes of the window for rows, and for the results of all products."""
    rows = ROUND_BYTES // 4 // 64 * 64
    return rows, ROUND_BYTES - rows
