"""Collectives made of two movements, an all-gather and an all-to-all of rows; the sums are made here.

MPI has no portable bf16, NCCL rounds bf16 at every hop of a ring, and neither promises an order. Here addends travel
as they are and are summed in fp32 in ascending rank order, so every transport gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, accumulation_dtype, check_counts
from xpar.comm.handshake import Tag, handshake
from xpar.comm.watchdog.collective_check import CollectiveSignature

SMALL_REDUCE_BYTES = 16384
"""Below this, gathering every addend is one latency; above, each rank sums its share and shares are gathered."""


class BaseCommunicator(Communicator):
    """What a communicator need not write itself once it can gather and exchange rows.

    Before each collective the ranks agree on operation, row size and dtype (one small all-gather), so that a
    mistake becomes a :class:`~xpar.comm.handshake.DesyncError` on all of them instead of a hang or wrong data.
    ``all_to_all_v`` and calls that pass ``counts`` skip it: their sizes were agreed when they were planned. Where the
    job was started with ``--debug-collectives``, everything is compared before everything.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        x = self._ready(x)
        self._agree("all_reduce", x, (x.numel(),), same_rows=True)
        flat = x.reshape(-1)
        if flat.numel() * flat.element_size() <= SMALL_REDUCE_BYTES:
            addends = self._gather(flat[None], [1] * self.size)
            return sum_in_order(addends, acc).reshape(x.shape)
        share = -(-flat.numel() // self.size)
        counts = [max(0, min(share, flat.numel() - r * share)) for r in range(self.size)]
        mine = self._sum_share(flat, counts, acc)
        return self._gather(mine, counts).reshape(x.shape)

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        x = self._ready(x)
        if counts is None:
            counts = self._agree("all_gather_v", x, x.shape[1:])
        elif len(counts) != self.size or counts[self.rank] != x.shape[0]:
            raise ValueError(
                f"all_gather_v: counts {list(counts)} do not give rank {self.rank} its {x.shape[0]} rows"
            )
        elif self._compares():
            self._compare(CollectiveSignature.of(f"all_gather_v of {list(counts)} rows", x, x.shape[1:]))
        return self._gather(x, counts)

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        check_counts("reduce_scatter_v", x, counts, self.size)
        acc = accumulation_dtype(x.dtype)
        x = self._ready(x)
        self._agree("reduce_scatter_v", x, x.shape, same_rows=True)
        return self._sum_share(x, counts, acc)

    # -- the two movements ----------------------------------------------------------------------------------

    def _ready(self, x: Tensor) -> Tensor:
        """``x`` contiguous; ValueError if it lies where this communicator does not reach."""
        raise NotImplementedError

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows of all ranks; every rank knows all ``counts``."""
        raise NotImplementedError

    def _swap(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """[size * counts[rank], ...]: every rank's rows for this one; every rank knows all ``counts``."""
        raise NotImplementedError

    # -- pieces ---------------------------------------------------------------------------------------------

    def _compares(self) -> bool:
        """Whether to call :meth:`_compare`."""
        return False

    def _compare(self, intent: CollectiveSignature) -> None:
        """Exchange what every rank is about to do; one DesyncError everywhere that names who differs. Collective."""

    def _compare_exchange(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], skip: int | None
    ) -> None:
        if self._compares():
            what = CollectiveSignature.of("all_to_all_v", x, x.shape[1:])
            self._compare(replace(what, send=tuple(send), recv=tuple(recv), skip=skip))

    def _agree(self, op: str, x: Tensor, row_shape: Sequence[int], same_rows: bool = False) -> list[int]:
        if self._compares():
            self._compare(CollectiveSignature.of(op, x, row_shape))
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

    def _sum_share(self, x: Tensor, counts: Sequence[int], acc: torch.dtype) -> Tensor:
        return sum_in_order(self._swap(x, counts).view(self.size, counts[self.rank], *x.shape[1:]), acc)


def arrival_buffer(
    x: Tensor, send: Sequence[int], recv: Sequence[int], out: Tensor | None, size: int
) -> Tensor:
    """Where the rows of an all-to-all arrive: ``out`` if it fits, else new memory. Refuses counts that do not fit."""
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
    """Sum over dim 0 in ``acc``, strictly in ascending order (``Tensor.sum`` may regroup), rounded once at the end.

    Two addends need no copy in ``acc``: torch adds 16-bit numbers in fp32 and rounds once.
    """
    if len(addends) == 2:
        return addends[0] + addends[1]
    total = addends[0].to(acc, copy=True)
    for addend in addends[1:]:
        total += addend
    return total.to(addends.dtype)
