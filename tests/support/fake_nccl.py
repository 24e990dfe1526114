"""NCCL's narrow interface on host memory over MPI, so that everything above it runs without a GPU.

And its faults.
"""

import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xpar.comm.device.nccl_library import IN_PROGRESS, SUCCESS

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

POLLS = 3


@dataclass
class FakeComm:
    mpi: Any
    polls: int = POLLS
    result: int = SUCCESS
    blocking: bool = False

    def begin(self) -> None:
        """Start an operation, which calls that block end before they return."""
        self.polls = 0 if self.blocking else POLLS


@dataclass
class FakeNccl:
    """See :class:`xpar.comm.device.nccl_library.Library`.

    Every operation is in progress for a few polls, unless calls block.

    ``world``: all ranks; those that join meet through the one that drew the unique id. ``fail``: name of a
    method that raises. ``stuck``, ``result``: what joining comes to instead of success. ``stuck_blocking``:
    joining by calls that block never ends. ``hold``: name of a method that never returns. ``calls``: what was
    asked, in order.
    """

    world: "Intracomm"
    fail: str = ""
    stuck: bool = False
    stuck_blocking: bool = False
    hold: str = ""
    result: int = SUCCESS
    release: int = 22809
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    _group: list[tuple[Any, ...]] = field(default_factory=list)

    def _note(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        if name == self.fail:
            raise RuntimeError(f"planted in {name}")
        if name == self.hold:
            time.sleep(3600)

    def version(self) -> int:
        return self.release

    def unique_id(self) -> bytes:
        self._note("unique_id")
        return f"{self.world.rank} {time.monotonic_ns()}".encode().ljust(128)

    def init(self, size: int, rank: int, unique_id: bytes, blocking: bool) -> FakeComm:
        self._note("init", size, rank, blocking)
        comm = FakeComm(self._meet(size, rank, unique_id), blocking=blocking)
        comm.begin()
        if self.stuck:
            comm.polls = 10**9
        comm.result = self.result
        if blocking and self.stuck_blocking:
            time.sleep(3600)
        return comm

    def _meet(self, size: int, rank: int, unique_id: bytes) -> "Intracomm":
        """The members report to the one that drew the id and learn who they are."""
        root, tag = int(unique_id.split()[0]), zlib.crc32(unique_id) % 30000
        if rank == 0:
            members = {0: root} | dict(self.world.recv(tag=tag) for _ in range(size - 1))
            for member in range(1, size):
                self.world.send(members, members[member], tag)
        else:
            self.world.send((rank, self.world.rank), root, tag)
            members = self.world.recv(source=root, tag=tag)
        group = self.world.Get_group().Incl([members[r] for r in range(size)])
        return self.world.Create_group(group, tag)

    def state(self, comm: FakeComm) -> int:
        comm.polls -= 1
        return IN_PROGRESS if comm.polls > 0 else comm.result

    def last_error(self, comm: FakeComm) -> str:
        return "planted error"

    def group_start(self) -> None:
        self._group = []

    def _issue(self, name: str, comm: FakeComm, *args: Any) -> None:
        self._note(name, *args)
        assert comm.polls <= 0, "used while an earlier operation was still in progress"

    def send(self, address: int, nbytes: int, peer: int, comm: FakeComm, stream: int) -> None:
        self._issue("send", comm, nbytes, peer)
        self._group.append(("Isend", address, nbytes, peer, comm))

    def recv(self, address: int, nbytes: int, peer: int, comm: FakeComm, stream: int) -> None:
        self._issue("recv", comm, nbytes, peer)
        self._group.append(("Irecv", address, nbytes, peer, comm))

    def group_end(self) -> None:
        from mpi4py import MPI

        requests = []
        for name, address, nbytes, peer, comm in self._group:
            assert nbytes > 0 and peer != comm.mpi.rank
            requests.append(getattr(comm.mpi, name)(MPI.buffer.fromaddress(address, nbytes), peer))
            comm.begin()
        MPI.Request.Waitall(requests)
        self._group = []

    def all_gather(self, source: int, target: int, nbytes: int, comm: FakeComm, stream: int) -> None:
        self._issue("all_gather", comm, nbytes)
        self._together("Allgather", source, nbytes, target, nbytes * comm.mpi.size, comm)

    def all_to_all(self, source: int, target: int, nbytes: int, comm: FakeComm, stream: int) -> None:
        self._issue("all_to_all", comm, nbytes)
        whole = nbytes * comm.mpi.size
        self._together("Alltoall", source, whole, target, whole, comm)

    def _together(
        self, name: str, source: int, leaving: int, target: int, arriving: int, comm: FakeComm
    ) -> None:
        from mpi4py import MPI

        comm.begin()
        getattr(comm.mpi, name)(
            MPI.buffer.fromaddress(source, leaving), MPI.buffer.fromaddress(target, arriving)
        )

    def abort(self, comm: FakeComm) -> None:
        self._note("abort")

    def finalize(self, comm: FakeComm) -> None:
        self._note("finalize")
        comm.begin()

    def destroy(self, comm: FakeComm) -> None:
        self._note("destroy")
        comm.mpi.Free()
