"""Collectives on host tensors over MPI.

Rows travel as an MPI datatype of ``row_bytes`` contiguous bytes: any dtype moves unchanged, and a count of
rows stays small where a count of bytes would pass 2**31. Sums are made here, in fp32 and in rank order, because
MPI has no portable bf16 and promises no order.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import (
    Communicator,
    Pending,
    Record,
    SoloCommunicator,
    accumulation_dtype,
    check_counts,
)
from xpar.comm.handshake import Tag, handshake

if TYPE_CHECKING:
    from mpi4py import MPI

    from xpar.comm.window import SharedWindow

SMALL_REDUCE_BYTES = 16384
"""Below this, gathering every addend is one latency; above, each rank sums its share and shares are gathered."""


PATIENCE_S = 0.002
"""Between two looks of a patient barrier."""


class MpiCommunicator:
    """One group's collectives on host memory.

    Before each collective the ranks agree on operation, row size and dtype (one small all-gather), so that a
    mistake becomes a :class:`~xpar.comm.handshake.DesyncError` on all of them instead of a hang or wrong data.
    ``all_to_all_v`` and calls that pass ``counts`` skip it: their sizes were agreed when they were planned.
    """

    def __init__(self, mpi_comm: "MPI.Comm", name: str, world_ranks: Sequence[int]) -> None:
        from mpi4py import MPI

        self._mpi, self.mpi_comm = MPI, mpi_comm
        self.name, self.rank, self.size = name, mpi_comm.rank, mpi_comm.size
        self.world_ranks = tuple(world_ranks)
        self._row_types: dict[int, MPI.Datatype] = {}
        self.window: SharedWindow | None = None

    # -- data plane -----------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        x = _host(x)
        self._agree("all_reduce", x, (x.numel(),), same_rows=True)
        flat = x.reshape(-1)
        if flat.numel() * flat.element_size() <= SMALL_REDUCE_BYTES:
            addends = self._gather(flat[None], [1] * self.size)
            return _sum_in_order(addends, acc).to(x.dtype).reshape(x.shape)
        share = -(-flat.numel() // self.size)
        counts = [max(0, min(share, flat.numel() - r * share)) for r in range(self.size)]
        mine = self._sum_share(flat, counts, acc)
        return self._gather(mine, counts).reshape(x.shape)

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        x = _host(x)
        if counts is None:
            counts = self._agree("all_gather_v", x, x.shape[1:])
        elif len(counts) != self.size or counts[self.rank] != x.shape[0]:
            raise ValueError(
                f"all_gather_v: counts {list(counts)} do not give rank {self.rank} its {x.shape[0]} rows"
            )
        return self._gather(x, counts)

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        check_counts("reduce_scatter_v", x, counts, self.size)
        acc = accumulation_dtype(x.dtype)
        x = _host(x)
        self._agree("reduce_scatter_v", x, x.shape, same_rows=True)
        return self._sum_share(x, counts, acc)

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        check_counts("all_to_all_v", x, send_counts, self.size)
        x = _host(x)
        if out is None:
            out = x.new_empty((sum(recv_counts), *x.shape[1:]))
        check_counts("all_to_all_v", out, recv_counts, self.size)
        if out.dtype != x.dtype or out.shape[1:] != x.shape[1:] or not out.is_contiguous():
            raise ValueError(
                f"all_to_all_v: out must be contiguous {x.dtype} rows of shape {tuple(x.shape[1:])}"
            )
        row = self._row_type(x)
        arriving = [0 if r == skip else n for r, n in enumerate(recv_counts)]
        request = self.mpi_comm.Ialltoallv(
            [_buffer(x), (send_counts, _offsets(send_counts)), row],
            [_buffer(out), (arriving, _offsets(recv_counts)), row],
        )
        return Pending(lambda: _complete(request, x, out))

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        if not 0 <= root < self.size:
            raise ValueError(
                f"broadcast: root {root} in a group of {self.size} ranks; use 0 to {self.size - 1}"
            )
        sent = _host(x)
        self._agree(f"broadcast from {root}", sent, sent.shape, same_rows=True)
        rows = sent.reshape(sent.shape[0] if sent.ndim else 1, -1)
        self.mpi_comm.Bcast([_buffer(rows), rows.shape[0], self._row_type(rows)], root=root)
        return x if sent is x else x.copy_(sent)

    def barrier(self, patient: bool = False) -> None:
        if not patient:
            self.mpi_comm.Barrier()
            return
        request = self.mpi_comm.Ibarrier()
        while not request.Test():
            time.sleep(PATIENCE_S)

    def split(self, color: int, key: int, name: str) -> Communicator:
        sub = self.mpi_comm.Split(color, key)
        world_ranks = sub.allgather(self.world_ranks[self.rank])
        if sub.size == 1:
            sub.Free()
            return SoloCommunicator(name, world_ranks[0], self.abort)
        return MpiCommunicator(sub, name, world_ranks)

    # -- metadata plane -------------------------------------------------------------------------------------

    def exchange(self, record: Record) -> Record:
        table = np.empty((self.size, record.size), dtype=np.int64)
        self.mpi_comm.Allgather(record, table)
        return table

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.mpi_comm.allgather(value)

    def abort(self, code: int) -> None:
        self.mpi_comm.Abort(code)

    def close(self) -> None:
        """Free the window, the datatypes and the MPI communicator; collective."""
        if self.window is not None:
            self.window.close()
        for row in self._row_types.values():
            row.Free()
        self._row_types.clear()
        self.mpi_comm.Free()

    # -- pieces ---------------------------------------------------------------------------------------------

    def _agree(self, op: str, x: Tensor, row_shape: Sequence[int], same_rows: bool = False) -> list[int]:
        facts = {
            "row_elements": int(np.prod(row_shape)),
            "itemsize": x.element_size(),
            "floating": x.is_floating_point(),
        }
        rows = x.shape[0] if x.ndim else 1
        if same_rows:
            facts["rows"] = rows
        table = handshake(self, Tag(f"{op} in group {self.name}"), same=facts, values=(rows,))
        return [int(n) for n in table[:, 0]]

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        row = self._row_type(x)
        self.mpi_comm.Allgatherv(
            [_buffer(x), x.shape[0], row], [_buffer(out), (list(counts), _offsets(counts)), row]
        )
        return out

    def _sum_share(self, x: Tensor, counts: Sequence[int], acc: torch.dtype) -> Tensor:
        mine = counts[self.rank]
        addends = self.all_to_all_v(x, counts, [mine] * self.size).wait()
        return _sum_in_order(addends.view(self.size, mine, *x.shape[1:]), acc).to(x.dtype)

    def _row_type(self, x: Tensor) -> "MPI.Datatype":
        row_bytes = max(1, int(np.prod(x.shape[1:])) * x.element_size())
        if row_bytes not in self._row_types:
            self._row_types[row_bytes] = self._mpi.BYTE.Create_contiguous(row_bytes).Commit()
        return self._row_types[row_bytes]


def _complete(request: "MPI.Request", sent: Tensor, out: Tensor) -> Tensor:
    request.Wait()
    del sent  # held until here: MPI reads it while the request is open
    return out


def _host(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        raise ValueError(
            f"the MPI communicator moves host tensors, got one on {x.device}; copy it to the CPU first"
        )
    return x.contiguous()


def _buffer(x: Tensor) -> Any:
    from mpi4py import MPI

    if not x.numel():  # two null pointers would look like aliased buffers
        return MPI.buffer(bytearray(1))
    return MPI.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size())


def _offsets(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts[:-1], dtype=np.int64).tolist()]


def _sum_in_order(addends: Tensor, acc: torch.dtype) -> Tensor:
    """Sum over dim 0, strictly in ascending order: ``Tensor.sum`` may regroup."""
    total = addends[0].to(acc, copy=True)
    for addend in addends[1:]:
        total += addend
    return total
