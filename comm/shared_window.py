"""Memory that all ranks of a group on one node read and write in place, as an MPI shared window."""

import atexit
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.failure import agreed
from xpar.comm.mpi_communicator import MpiCommunicator

if TYPE_CHECKING:
    from mpi4py import MPI

SHARED_FILES = "/dev/shm"
"""Where MPI libraries keep shared windows; a container often gives it 64 MB."""
ALIGNMENT = 4096
LEAST_BYTES = 1 << 20
"""With less than this left, MPI itself cannot start."""


class SharedWindow:
    """Bytes that every rank of ``group`` sees at its own address; grows, never shrinks.

    A write is visible to the others after the next :meth:`fence`. Tensors made by :meth:`view` are valid until the
    next call of :meth:`reserve` that grows the window.
    """

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._window: MPI.Win | None = None
        if isinstance(group, MpiCommunicator):
            atexit.register(self.close)  # MPI_Finalize must find no open window

    def reserve(self, nbytes: int) -> None:
        """Have room for ``nbytes``, the same number on every rank; collective where the window has to grow.

        Raises :class:`~xpar.comm.failure.AgreedError` on every rank if the node has no room for it.
        """
        if nbytes <= self._bytes.numel():
            return
        # A step more than is asked for, so that slowly growing batches do not open a new window each time.
        size = -(-max(nbytes, self._bytes.numel() * 3 // 2) // ALIGNMENT) * ALIGNMENT
        if not isinstance(self.group, MpiCommunicator):
            self._bytes = torch.empty(size, dtype=torch.uint8)
            return
        agreed(self.group, lambda: check_room(size, self._bytes.numel()), "shared-memory dispatch")
        self._free()
        self._open(cast("MPI.Intracomm", self.group.mpi_comm), size)

    def view(self, first_byte: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """``shape`` elements of ``dtype`` that begin ``first_byte`` bytes into the window."""
        nbytes = shape[0] * shape[1] * dtype.itemsize
        return self._bytes[first_byte : first_byte + nbytes].view(dtype).view(shape)

    def sync(self) -> None:
        """Half of a fence, for ranks that wait for each other by another exchange: called before it and after it."""
        if self._window is not None:
            self._window.Sync()

    def fence(self) -> None:
        """Wait for every rank; what any of them wrote before is visible to all afterwards."""
        self.arrive().wait()

    def arrive(self) -> Pending[None]:
        """Tell the others that this rank has written; ``wait`` for them to have. Both together are a :meth:`fence`."""
        window = self._window
        if window is None or not isinstance(self.group, MpiCommunicator):
            return Pending(lambda: None)
        window.Sync()
        everyone = self.group.start_barrier()

        def meet() -> None:
            everyone.wait()
            window.Sync()

        return Pending(meet)

    def close(self) -> None:
        """Give the memory back; collective. Runs by itself when the process ends."""
        atexit.unregister(self.close)
        self._free()

    def _open(self, comm: "MPI.Intracomm", size: int) -> None:
        from mpi4py import MPI

        # One segment, held by rank 0: positions in it are the same for all, with no gaps between the ranks' parts.
        with cast(MpiCommunicator, self.group).waiting("opening a window"):
            self._window = MPI.Win.Allocate_shared(size if comm.rank == 0 else 0, 1, comm=comm)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._bytes = torch.frombuffer(self._window.Shared_query(0)[0], dtype=torch.uint8)

    def _free(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self._window is not None:
            with cast(MpiCommunicator, self.group).waiting("closing a window"):
                self._window.Unlock_all()
                self._window.Free()
            self._window = None


def window_of(group: Communicator, use: str = "tokens") -> SharedWindow:
    """The window that everything on ``group`` shares for one ``use``: a model's layers run one after the other and need only one."""
    if not isinstance(group, MpiCommunicator):
        return SharedWindow(group)
    if use not in group.windows:
        group.windows[use] = SharedWindow(group)
    return group.windows[use]


def free_bytes() -> int:
    """Room for shared windows on this node, in bytes; 0 where there is no place for them."""
    try:
        state = os.statvfs(SHARED_FILES)
    except OSError:
        return 0
    return state.f_bavail * state.f_frsize


def refuse_full_memory() -> None:
    """Raise ValueError where MPI could not start: it shares memory within a node, and is killed where there is none."""
    free = free_bytes()
    if Path(SHARED_FILES).is_dir() and free < LEAST_BYTES:
        raise ValueError(
            f"{SHARED_FILES} on {socket.gethostname()} has {free / 1e6:.1f} MB left, and MPI needs a few a rank; remove stale "
            f"files there (rm {SHARED_FILES}/mpich_shm_* where nothing runs), or enlarge it (containers: --shm-size)"
        )


def check_room(nbytes: int, given_back: int = 0) -> None:
    """Raise ValueError unless a window of ``nbytes`` fits once ``given_back`` is freed.

    The window itself would open all the same: the process is killed (SIGBUS) when it first touches a missing page.
    """
    free = free_bytes() + given_back
    if nbytes > free:
        raise ValueError(
            f"a window of {nbytes / 1e6:.0f} MB does not fit into {SHARED_FILES}, which has {free / 1e6:.0f} MB left; "
            "enlarge it (containers: --shm-size), send fewer tokens at a time, or choose the dispatcher alltoall"
        )
