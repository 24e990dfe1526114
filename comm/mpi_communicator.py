"""Collectives on host tensors over MPI.

Rows travel as an MPI datatype of ``row_bytes`` contiguous bytes: any dtype moves unchanged, and a count of
rows stays small where a count of bytes would pass 2**31.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from xpar.comm.base_communicator import BaseCommunicator, arrival_buffer
from xpar.comm.communicator import Communicator, Header, Pending, SoloCommunicator
from xpar.comm.handshake import DesyncError, Tag
from xpar.comm.watchdog.collective_check import CollectiveSignature, difference
from xpar.comm.watchdog.journal import Journal, NoJournal
from xpar.comm.watchdog.watchdog import Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

    from xpar.comm.shared_window import SharedWindow

PATIENCE_S = 0.002
"""Between two looks of a patient barrier."""


class MpiCommunicator(BaseCommunicator):
    """One group's collectives on host memory. ``guard``: who is told when this rank begins to wait for the others."""

    def __init__(
        self, mpi_comm: "MPI.Comm", name: str, world_ranks: Sequence[int], guard: Watchdog | None = None
    ) -> None:
        from mpi4py import MPI

        self._mpi, self.mpi_comm = MPI, mpi_comm
        self.name, self.rank, self.size = name, mpi_comm.rank, mpi_comm.size
        self.world_ranks = tuple(world_ranks)
        self.guard = guard
        self._journal: Journal = NoJournal() if guard is None else guard.journal(name, self.world_ranks)
        self._row_types: dict[int, MPI.Datatype] = {}
        self.windows: dict[str, SharedWindow] = {}

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
        self._compare_exchange(x, send_counts, recv_counts, skip)
        return self.exchange_into(x, send_counts, recv_counts, out, skip)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        sent = _host(x)
        self._agree_root(sent, root)
        rows = sent.reshape(sent.shape[0] if sent.ndim else 1, -1)
        journal, row = self._journal, self._row_type(rows)
        journal.enter(journal.begin(), "broadcast", None, rows.shape[0], rows.shape[0], row.Get_size())
        self.mpi_comm.Bcast([_buffer(rows), rows.shape[0], row], root=root)
        journal.leave()
        return x if sent is x else x.copy_(sent)

    def barrier(self, patient: bool = False) -> None:
        journal = self._journal
        if not patient:
            if journal.compares:
                self._compare(CollectiveSignature("barrier"))
            journal.enter(journal.begin(), "barrier")
            self.mpi_comm.Barrier()
            journal.leave()
            return
        with self.waiting("patient barrier", math.inf):
            request = self.mpi_comm.Ibarrier()
            while not request.Test():
                time.sleep(PATIENCE_S)

    def start_barrier(self) -> Pending[None]:
        """A barrier in two halves: this rank has come, and ``wait`` returns once every rank has."""
        journal = self._journal
        if journal.compares:
            self._compare(CollectiveSignature("barrier in two halves"))
        seq = journal.begin()
        journal.enter(seq, "barrier")
        request = self.mpi_comm.Ibarrier()
        journal.leave()

        def complete() -> None:
            journal.enter(seq, "barrier")
            request.Wait()
            journal.leave()

        return Pending(complete)

    def split(self, color: int, key: int, name: str) -> Communicator:
        self._compare(CollectiveSignature(f"split into {name}"))
        with self.waiting(f"split into {name}", self._patience()):
            sub = self.mpi_comm.Split(color, key)
            world_ranks = sub.allgather(self.world_ranks[self.rank])
        if sub.size == 1:
            sub.Free()
            return SoloCommunicator(name, world_ranks[0], self.abort)
        return MpiCommunicator(sub, name, world_ranks, self.guard)

    # -- raw movement: any memory that the MPI library itself can reach ----------------------------------------

    def gather_into(self, x: Tensor, counts: Sequence[int], out: Tensor) -> Tensor:
        """``Allgatherv`` of the rows of contiguous ``x`` into contiguous ``out`` [sum(counts), ...]; checks nothing."""
        row, journal, total = self._row_type(x), self._journal, out.shape[0]
        journal.enter(journal.begin(), "all_gather_v", None, x.shape[0], total, row.Get_size())
        self.mpi_comm.Allgatherv(
            [_buffer(x), x.shape[0], row], [_buffer(out), (list(counts), _offsets(counts)), row]
        )
        journal.leave()
        return out

    def exchange_into(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], out: Tensor, skip: int | None = None
    ) -> Pending[Tensor]:
        """``Ialltoallv`` of rows, see :meth:`all_to_all_v`; checks nothing."""
        row = self._row_type(x)
        leaving, arriving = ([0 if r == skip else n for r, n in enumerate(counts)] for counts in (send, recv))
        journal = self._journal
        seq, sizes = journal.begin(), (sum(leaving), sum(arriving), row.Get_size())
        journal.enter(seq, "all_to_all_v", None, *sizes)
        request = self.mpi_comm.Ialltoallv(
            [_buffer(x), (leaving, _offsets(send)), row], [_buffer(out), (arriving, _offsets(recv)), row]
        )
        journal.leave()

        def complete() -> Tensor:
            journal.enter(seq, "all_to_all_v", None, *sizes)
            request.Wait()
            journal.leave()
            held.clear()
            return out

        held = [x]  # MPI reads it while the request is open
        return Pending(complete)

    # -- metadata plane -------------------------------------------------------------------------------------

    def exchange(self, record: Header, tag: Tag | None = None) -> Header:
        tag, journal = tag or Tag("exchange"), self._journal
        journal.at(tag.layer, tag.step)
        if journal.compares:
            self._compare(CollectiveSignature(f"handshake {tag}"))
        table = np.empty((self.size, record.size), dtype=np.int64)
        op = tag.op.removesuffix(f" in group {self.name}")  # the report names the group itself
        journal.enter(journal.begin(), op, None, tag.rows, 0, tag.row_bytes)
        self.mpi_comm.Allgather(record, table)
        journal.leave()
        return table

    def all_gather_object(self, value: Any) -> list[Any]:
        self._compare(CollectiveSignature("all_gather_object"))
        with self.waiting("all_gather_object", self._patience()):
            return self.mpi_comm.allgather(value)

    def abort(self, code: int) -> None:
        self.mpi_comm.Abort(code)

    def close(self) -> None:
        """Free the windows, the datatypes and the MPI communicator; collective."""
        for window in self.windows.values():
            window.close()
        for row in self._row_types.values():
            row.Free()
        self._row_types.clear()
        self.mpi_comm.Free()

    @contextmanager
    def waiting(self, op: str, seconds: float | None = None) -> Iterator[None]:
        """Around an MPI call in which all ranks of the group take part: it has a deadline, and a place in reports."""
        self._journal.enter(self._journal.begin(), op, seconds)
        try:
            yield
        finally:
            self._journal.leave()

    # -- pieces ---------------------------------------------------------------------------------------------

    def _patience(self) -> float:
        """For what belongs to set-up and comes after work of one rank's own, such as reading files."""
        return math.inf if self.guard is None else self.guard.deadlines.start

    def _compares(self) -> bool:
        return self._journal.compares

    def _compare(self, intent: CollectiveSignature) -> None:
        if not self._journal.compares:
            return
        with self.waiting(f"comparing {intent}", self._patience()):
            intents = self.mpi_comm.allgather(intent)
        differs = difference(intents, self.world_ranks)
        if differs is not None:
            raise DesyncError(f"the ranks of group {self.name} do not fit together\n{differs}")

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
