"""Collectives made of two movements of rows, an all-gather and an all-to-all, and of sums.

MPI has no portable bf16, NCCL rounds bf16 at every hop of a ring, and neither promises an order of summation.
Here addends travel as they are and are summed in fp32 in ascending rank order, so every transport gives the
same bits.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Tag, accumulation_dtype, check_counts
from xpar.comm.handshake import handshake
from xpar.comm.watchdog.collective_check import CollectiveSignature

SMALL_REDUCE_BYTES = 16384
"""bytes; up to this size all ranks gather every addend in one exchange. Above, each rank sums its part of the
elements and the parts are gathered."""


class BaseCommunicator(Communicator):
    """The part of a communicator that follows from the ability to gather and exchange rows.

    Before each collective the ranks agree on operation, row size and dtype (one small all-gather), so that a
    mistake becomes a :class:`~xpar.comm.handshake.DesyncError` on all of them instead of a hang or wrong
    data. ``all_to_all_v``, gathers that pass ``counts`` and sums that are ``planned`` skip that agreement:
    their sizes were agreed when they were planned. If the job was started with ``--debug-collectives``, every
    collective is compared on all ranks before it begins.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        x = self._ready(x)
        self._agree("all_reduce", x, (x.numel(),), same_rows=True)
        flat = x.reshape(-1)
        if flat.numel() * flat.element_size() <= SMALL_REDUCE_BYTES:
            addends = self._gather(flat[None], [1] * self.size)
            return sum_in_order(addends, acc).reshape(x.shape)
        part = -(-flat.numel() // self.size)
        counts = [max(0, min(part, flat.numel() - r * part)) for r in range(self.size)]
        return self._gather(self._sum_part(flat, counts, acc), counts).reshape(x.shape)

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        x = self._ready(x)
        if counts is None:
            counts = self._agree("all_gather_v", x, x.shape[1:])
        elif len(counts) != self.size or counts[self.rank] != x.shape[0]:
            raise ValueError(
                f"all_gather_v: counts {list(counts)} do not give rank {self.rank} its {x.shape[0]} rows"
            )
        elif self.checks_collectives():
            self.check_collective(
                CollectiveSignature.of(f"all_gather_v of {list(counts)} rows", x, x.shape[1:])
            )
        return self._gather(x, counts)

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int], planned: bool = False) -> Tensor:
        check_counts("reduce_scatter_v", x, counts, self.size)
        acc = accumulation_dtype(x.dtype)
        x = self._ready(x)
        if not planned:
            self._agree("reduce_scatter_v", x, x.shape, same_rows=True)
        elif self.checks_collectives():
            self.check_collective(CollectiveSignature.of("reduce_scatter_v", x, x.shape))
        return self._sum_part(x, counts, acc)

    # -- the two movements ----------------------------------------------------------------------------------

    def _ready(self, x: Tensor) -> Tensor:
        """Return ``x`` contiguous; ValueError if its device is not this communicator's."""
        raise NotImplementedError

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """All-gather rows; every rank knows the ``counts`` of all ranks."""
        raise NotImplementedError

    def _swap(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Send ``counts[r]`` rows to each rank r and return those for this one, by source."""
        raise NotImplementedError

    # -- checks before a collective
    # ---------------------------------------------------------------------------

    def checks_collectives(self) -> bool:
        """Return whether every collective must be compared by :meth:`check_collective` before it begins."""
        return False

    def check_collective(self, signature: CollectiveSignature) -> None:
        """Raise DesyncError on every rank if the ranks are about to enter different collectives."""

    def _check_exchange(self, x: Tensor, send: Sequence[int], recv: Sequence[int], skip: int | None) -> None:
        if self.checks_collectives():
            signature = CollectiveSignature.of("all_to_all_v", x, x.shape[1:])
            self.check_collective(replace(signature, send=tuple(send), recv=tuple(recv), skip=skip))

    def _agree(self, op: str, x: Tensor, row_shape: Sequence[int], same_rows: bool = False) -> list[int]:
        """Agree on operation, dtype size, row size (and rows, if asked); return rows per rank."""
        if self.checks_collectives():
            self.check_collective(CollectiveSignature.of(op, x, row_shape))
        facts = {
            "row_elements": int(np.prod(row_shape)),
            "itemsize": x.element_size(),
            "floating": x.is_floating_point(),
        }
        rows = x.shape[0] if x.ndim else 1
        if same_rows:
            facts["rows"] = rows
        tag = Tag(f"{op} in group {self.name}", rows=rows, row_bytes=facts["row_elements"] * x.element_size())
        table = handshake(self, tag, same=facts, values=(rows,))
        return [int(n) for n in table[:, 0]]

    def _agree_root(self, x: Tensor, root: int) -> None:
        if not 0 <= root < self.size:
            raise ValueError(
                f"broadcast: root {root} in a group of {self.size} ranks; use 0 to {self.size - 1}"
            )
        self._agree(f"broadcast from {root}", x, x.shape, same_rows=True)

    def _sum_part(self, x: Tensor, counts: Sequence[int], acc: torch.dtype) -> Tensor:
        return sum_in_order(self._swap(x, counts).view(self.size, counts[self.rank], *x.shape[1:]), acc)


def receive_buffer(
    x: Tensor, send: Sequence[int], recv: Sequence[int], out: Tensor | None, size: int
) -> Tensor:
    """Return the memory for the rows that an all-to-all receives: ``out``, or new memory.

    ValueError if counts do not describe their tensor, or ``out`` is not contiguous for rows like those of
    ``x``.
    """
    check_counts("all_to_all_v", x, send, size)
    if out is None:
        out = x.new_empty((sum(recv), *x.shape[1:]))
    check_counts("all_to_all_v", out, recv, size)
    if out.dtype != x.dtype or out.shape[1:] != x.shape[1:] or not out.is_contiguous():
        raise ValueError(
            f"all_to_all_v: out must be contiguous {x.dtype} rows of shape {tuple(x.shape[1:])}, "
            f"not {out.dtype} of {tuple(out.shape[1:])}"
        )
    return out


def sum_in_order(addends: Tensor, acc: torch.dtype) -> Tensor:
    """Sum ``addends`` over dim 0 in dtype ``acc`` in ascending order, and round once at the end.

    ``Tensor.sum`` may regroup. Two addends need no copy in ``acc``: torch adds 16-bit numbers in fp32 and
    rounds once.
    """
    if len(addends) == 2:
        return addends[0] + addends[1]
    total = addends[0].to(acc, copy=True)
    for addend in addends[1:]:
        total += addend
    return total.to(addends.dtype)
