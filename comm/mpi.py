"""Collectives on host tensors over MPI.

Rows travel as an MPI datatype of ``row_bytes`` contiguous bytes: any dtype moves unchanged, and a count of
rows stays small where a count of bytes would pass 2**31.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from xpar.comm.collectives import Collectives, arrival_buffer
from xpar.comm.communicator import Communicator, Pending, Record, SoloCommunicator

if TYPE_CHECKING:
    from mpi4py import MPI

    from xpar.comm.window import SharedWindow

PATIENCE_S = 0.002
"""Between two looks of a patient barrier."""


class MpiCommunicator(Collectives):
    """One group's collectives on host memory."""

    def __init__(self, mpi_comm: "MPI.Comm", name: str, world_ranks: Sequence[int]) -> None:
        from mpi4py import MPI

        self._mpi, self.mpi_comm = MPI, mpi_comm
        self.name, self.rank, self.size = name, mpi_comm.rank, mpi_comm.size
        self.world_ranks = tuple(world_ranks)
        self._row_types: dict[int, MPI.Datatype] = {}
        self.window: SharedWindow | None = None

    # -- data plane -----------------------------------------------------------------------------------------

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        x = _host(x)
        out = arrival_buffer(x, send_counts, recv_counts, out, self.size)
        return self.exchange_into(x, send_counts, recv_counts, out, skip)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        sent = _host(x)
        self._agree_root(sent, root)
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

    # -- raw movement: any memory that the MPI library itself can reach ----------------------------------------

    def gather_into(self, x: Tensor, counts: Sequence[int], out: Tensor) -> Tensor:
        """``Allgatherv`` of the rows of contiguous ``x`` into contiguous ``out`` [sum(counts), ...]; checks nothing."""
        row = self._row_type(x)
        self.mpi_comm.Allgatherv(
            [_buffer(x), x.shape[0], row], [_buffer(out), (list(counts), _offsets(counts)), row]
        )
        return out

    def exchange_into(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], out: Tensor, skip: int | None = None
    ) -> Pending[Tensor]:
        """``Ialltoallv`` of rows, see :meth:`all_to_all_v`; checks nothing."""
        row = self._row_type(x)
        leaving, arriving = ([0 if r == skip else n for r, n in enumerate(counts)] for counts in (send, recv))
        request = self.mpi_comm.Ialltoallv(
            [_buffer(x), (leaving, _offsets(send)), row], [_buffer(out), (arriving, _offsets(recv)), row]
        )
        return Pending(lambda: _complete(request, x, out))

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

    def _ready(self, x: Tensor) -> Tensor:
        return _host(x)

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self.gather_into(x, counts, x.new_empty((sum(counts), *x.shape[1:])))

    def _swap(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self.all_to_all_v(x, counts, [counts[self.rank]] * self.size).wait()

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
            f"the MPI communicator moves host tensors, got one on {x.device}; copy it to the CPU first, or create "
            "the process grid with device='cuda'"
        )
    return x.contiguous()


def _buffer(x: Tensor) -> Any:
    from mpi4py import MPI

    if not x.numel():  # two null pointers would look like aliased buffers
        return MPI.buffer(bytearray(1))
    return MPI.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size())


def _offsets(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts[:-1], dtype=np.int64).tolist()]
