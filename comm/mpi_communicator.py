"""Collectives on host tensors over MPI.

Rows travel as an MPI datatype of ``row_bytes`` contiguous bytes: any dtype moves unchanged, and a count of
rows stays small where a count of bytes would pass 2**31.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from xpar.comm.base_communicator import BaseCommunicator, receive_buffer
from xpar.comm.communicator import Communicator, Header, Pending, SoloCommunicator, Tag
from xpar.comm.handshake import DesyncError
from xpar.comm.watchdog.collective_check import CollectiveSignature, find_difference
from xpar.comm.watchdog.journal import Journal, NoJournal
from xpar.comm.watchdog.watchdog import Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

PATIENT_POLL_S = 0.002
"""seconds between two polls of a patient barrier"""


class Closeable(Protocol):
    """A resource of a group that is freed together with the group."""

    def close(self) -> None:
        """Free the resource; collective over the group."""


class MpiCommunicator(BaseCommunicator):
    """The collectives of one group on host memory.

    Attributes:
        mpi_comm: The MPI communicator, owned by this object.
        watchdog: The watchdog that enforces deadlines of this group's collectives, or None.
        resources: What other modules keep for as long as the group lives, by name; :meth:`close` closes it.
    """

    def __init__(
        self, mpi_comm: "MPI.Comm", name: str, world_ranks: Sequence[int], watchdog: Watchdog | None = None
    ) -> None:
        from mpi4py import MPI

        self._mpi, self.mpi_comm = MPI, mpi_comm
        self.name, self.rank, self.size = name, mpi_comm.rank, mpi_comm.size
        self.world_ranks = tuple(world_ranks)
        self.watchdog = watchdog
        self._journal: Journal = NoJournal() if watchdog is None else watchdog.journal(name, self.world_ranks)
        self._row_types: dict[int, MPI.Datatype] = {}
        self.resources: dict[str, Closeable] = {}

    # -- data plane -----------------------------------------------------------------------------------------

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        x = _require_host(x)
        out = receive_buffer(x, send_counts, recv_counts, out, self.size)
        self._check_exchange(x, send_counts, recv_counts, skip)
        return self.exchange_into(x, send_counts, recv_counts, out, skip)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        sent = _require_host(x)
        self._agree_root(sent, root)
        rows = sent.reshape(sent.shape[0] if sent.ndim else 1, -1)
        journal, row = self._journal, self._row_type(rows)
        journal.enter(journal.next_seq(), "broadcast", None, rows.shape[0], rows.shape[0], row.Get_size())
        self.mpi_comm.Bcast([_buffer(rows), rows.shape[0], row], root=root)
        journal.leave()
        return x if sent is x else x.copy_(sent)

    def barrier(self, patient: bool = False) -> None:
        journal = self._journal
        if not patient:
            if journal.checks_collectives:
                self.check_collective(CollectiveSignature("barrier"))
            journal.enter(journal.next_seq(), "barrier")
            self.mpi_comm.Barrier()
            journal.leave()
            return
        with self.journal_entry("patient barrier", math.inf):
            request = self.mpi_comm.Ibarrier()
            while not request.Test():
                time.sleep(PATIENT_POLL_S)

    def start_barrier(self) -> Pending[None]:
        """Start a barrier; ``wait`` of the result returns once every rank has started it."""
        journal = self._journal
        if journal.checks_collectives:
            self.check_collective(CollectiveSignature("barrier in two halves"))
        seq = journal.next_seq()
        journal.enter(seq, "barrier")
        request = self.mpi_comm.Ibarrier()
        journal.leave()

        def complete() -> None:
            journal.enter(seq, "barrier")
            request.Wait()
            journal.leave()

        return Pending(complete)

    def split(self, color: int, key: int, name: str) -> Communicator:
        self.check_collective(CollectiveSignature(f"split into {name}"))
        with self.journal_entry(f"split into {name}", self._setup_seconds()):
            sub = self.mpi_comm.Split(color, key)
            world_ranks = sub.allgather(self.world_ranks[self.rank])
        if sub.size == 1:
            sub.Free()
            return SoloCommunicator(name, world_ranks[0], self.abort)
        return MpiCommunicator(sub, name, world_ranks, self.watchdog)

    # -- raw movement: any memory that the MPI library itself can reach
    # ----------------------------------------

    def gather_into(self, x: Tensor, counts: Sequence[int], out: Tensor) -> Tensor:
        """Call ``Allgatherv`` for contiguous ``x`` into contiguous ``out``, unchecked."""
        row, journal, total = self._row_type(x), self._journal, out.shape[0]
        journal.enter(journal.next_seq(), "all_gather_v", None, x.shape[0], total, row.Get_size())
        self.mpi_comm.Allgatherv(
            [_buffer(x), x.shape[0], row], [_buffer(out), (list(counts), _offsets(counts)), row]
        )
        journal.leave()
        return out

    def exchange_into(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], out: Tensor, skip: int | None = None
    ) -> Pending[Tensor]:
        """Call ``Ialltoallv`` for rows, unchecked; the arguments are those of :meth:`all_to_all_v`."""
        row = self._row_type(x)
        sent, received = ([0 if r == skip else n for r, n in enumerate(counts)] for counts in (send, recv))
        journal = self._journal
        seq, sizes = journal.next_seq(), (sum(sent), sum(received), row.Get_size())
        journal.enter(seq, "all_to_all_v", None, *sizes)
        request = self.mpi_comm.Ialltoallv(
            [_buffer(x), (sent, _offsets(send)), row], [_buffer(out), (received, _offsets(recv)), row]
        )
        journal.leave()

        def complete() -> Tensor:
            journal.enter(seq, "all_to_all_v", None, *sizes)
            request.Wait()
            journal.leave()
            kept_alive.clear()
            return out

        kept_alive = [x]  # MPI reads x until the request is complete
        return Pending(complete)

    # -- metadata plane -------------------------------------------------------------------------------------

    def exchange(self, header: Header, tag: Tag | None = None) -> Header:
        tag, journal = tag or Tag("exchange"), self._journal
        journal.set_step(tag.layer, tag.step)
        if journal.checks_collectives:
            self.check_collective(CollectiveSignature(f"handshake {tag}"))
        table = np.empty((self.size, header.size), dtype=np.int64)
        op = tag.op.removesuffix(f" in group {self.name}")  # the report names the group itself
        journal.enter(journal.next_seq(), op, None, tag.rows, 0, tag.row_bytes)
        self.mpi_comm.Allgather(header, table)
        journal.leave()
        return table

    def enter_step(self, tag: Tag) -> None:
        self._journal.set_step(tag.layer, tag.step)

    def all_gather_object(self, value: Any) -> list[Any]:
        self.check_collective(CollectiveSignature("all_gather_object"))
        with self.journal_entry("all_gather_object", self._setup_seconds()):
            return self.mpi_comm.allgather(value)

    def abort(self, code: int) -> None:
        self.mpi_comm.Abort(code)

    def close(self) -> None:
        """Close the group's resources and free its datatypes and the MPI communicator; collective."""
        for resource in self.resources.values():
            resource.close()
        for row in self._row_types.values():
            row.Free()
        self._row_types.clear()
        self.mpi_comm.Free()

    @contextmanager
    def journal_entry(self, op: str, seconds: float | None = None) -> Iterator[None]:
        """Give the MPI call in the block, made by all ranks, a deadline (None: the step's) and a line."""
        self._journal.enter(self._journal.next_seq(), op, seconds)
        try:
            yield
        finally:
            self._journal.leave()

    # -- pieces ---------------------------------------------------------------------------------------------

    def _setup_seconds(self) -> float:
        """Return the deadline of collectives in set-up, where a rank may read files before them."""
        return math.inf if self.watchdog is None else self.watchdog.deadlines.start

    def checks_collectives(self) -> bool:
        return self._journal.checks_collectives

    def check_collective(self, signature: CollectiveSignature) -> None:
        if not self._journal.checks_collectives:
            return
        with self.journal_entry(f"comparing {signature}", self._setup_seconds()):
            signatures = self.mpi_comm.allgather(signature)
        differs = find_difference(signatures, self.world_ranks)
        if differs is not None:
            raise DesyncError(f"the ranks of group {self.name} do not fit together\n{differs}")

    def _ready(self, x: Tensor) -> Tensor:
        return _require_host(x)

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self.gather_into(x, counts, x.new_empty((sum(counts), *x.shape[1:])))

    def _swap(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self.all_to_all_v(x, counts, [counts[self.rank]] * self.size).wait()

    def _row_type(self, x: Tensor) -> "MPI.Datatype":
        """Return the committed MPI datatype of one row of ``x``; one is kept per row size."""
        row_bytes = max(1, int(np.prod(x.shape[1:])) * x.element_size())
        if row_bytes not in self._row_types:
            self._row_types[row_bytes] = self._mpi.BYTE.Create_contiguous(row_bytes).Commit()
        return self._row_types[row_bytes]


def _require_host(x: Tensor) -> Tensor:
    """Return ``x`` contiguous; ValueError unless ``x`` is in host memory."""
    if x.device.type != "cpu":
        raise ValueError(
            f"the MPI communicator moves host tensors, got one on {x.device}; copy it to the CPU first, or "
            "create the process grid with device='cuda'"
        )
    return x.contiguous()


def _buffer(x: Tensor) -> Any:
    from mpi4py import MPI

    if not x.numel():  # two null pointers would look like aliased buffers
        return MPI.buffer(bytearray(1))
    return MPI.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size())


def _offsets(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts[:-1], dtype=np.int64).tolist()]
