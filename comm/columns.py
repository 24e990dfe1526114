"""Products that the ranks of a node share out: each makes some of the columns, for the rows of all.

A rank then reads its part of a weight instead of all of it, which is what a product of few rows takes its time for.
T rows of this rank, K numbers of a row, N columns of a result.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.handshake import Tag, handshake
from xpar.comm.shares import share
from xpar.comm.window import window_of

ROUND_BYTES = 16 * 2**20
"""Of rows and results that lie in the node's shared window at a time."""


class SharedColumns:
    """Every rank of ``group``, whose ranks share memory, calls :meth:`product` together, those without rows too."""

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self._window = window_of(group)

    def product(
        self,
        x: Tensor,
        outputs: int,
        columns: slice,
        compute: Callable[[Tensor], Tensor],
        tag: Tag,
    ) -> Tensor:
        """[T, N = ``outputs``]: what the ranks' ``compute`` make of ``x`` [T, K], each its own ``columns`` of it.

        ``compute``: rows [R, K] of any ranks to [R, columns]; not called where ``columns`` is empty, or with no rows.

        The rows of all ranks are agreed upon first, so that nobody still reads the last product's results when the
        next rows are written.
        """
        facts = {"inputs": x.shape[1], "outputs": outputs, "bytes": x.element_size()}
        table = handshake(self.group, tag, same=facts, values=(x.shape[0],))
        counts = [int(n) for n in table[:, 0]]
        row_bytes = (x.shape[1] + outputs) * x.element_size() * self.group.size
        at_a_time = max(1, ROUND_BYTES // row_bytes)
        out = x.new_empty(x.shape[0], outputs)
        for first in range(0, max(counts), at_a_time):
            here = slice(first, first + at_a_time)
            parts = [max(0, min(at_a_time, count - first)) for count in counts]
            self._round(x[here], out[here], parts, columns, compute)
        return out

    def _round(
        self,
        x: Tensor,
        out: Tensor,
        parts: Sequence[int],
        columns: slice,
        compute: Callable[[Tensor], Tensor],
    ) -> None:
        """Two fences: once the rows are there, and once the results are."""
        total, inputs, outputs = sum(parts), x.shape[1], out.shape[1]
        before = sum(parts[: self.group.rank])
        mine = slice(before, before + x.shape[0])
        self._window.reserve(total * (inputs + outputs) * x.element_size())
        rows = self._window.view(0, (total, inputs), x.dtype)
        results = self._window.view(total * inputs * x.element_size(), (total, outputs), x.dtype)
        rows[mine] = x
        self._window.fence()
        if columns.start < columns.stop:
            results[:, columns] = compute(rows)
        self._window.fence()
        out.copy_(results[mine])


def columns_of(outputs: int, group: Communicator, unit: int = 64) -> slice:
    """This rank's columns of ``outputs``: as many whole ``unit`` as the others' or one more; possibly none."""
    units = share(-(-outputs // unit), group.size, group.rank)
    return slice(min(outputs, units.start * unit), min(outputs, units.stop * unit))
