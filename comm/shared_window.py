"""Memory that all ranks of a group on one node use in place: an MPI shared window."""

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
"""The folder in which MPI libraries keep shared windows; a container often gives it 64 MB."""
ALIGNMENT = 4096
"""bytes; sizes of windows are multiples of this"""
LEAST_BYTES = 1 << 20
"""bytes; with less than this left, MPI itself cannot start"""


class SharedWindow:
    """Bytes that every rank of ``group`` sees at an address of its own.

    A window grows and never shrinks. A write is visible to the other ranks after the next :meth:`fence`.
    Tensors made by :meth:`view` are valid until the next call of :meth:`reserve` that grows the window.
    """

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._window: MPI.Win | None = None
        if isinstance(group, MpiCommunicator):
            atexit.register(self.close)  # MPI_Finalize must find no open window

    def reserve(self, nbytes: int) -> None:
        """Make the window at least ``nbytes`` large, the same number on every rank.

        Collective if it has to grow. :class:`~xpar.comm.failure.AgreedError` if the node has no room for it.
        """
        if nbytes <= self._bytes.numel():
            return
        # Half as much again as the window had, so that slowly growing batches do not open a new window each
        # time.
        size = -(-max(nbytes, self._bytes.numel() * 3 // 2) // ALIGNMENT) * ALIGNMENT
        if not isinstance(self.group, MpiCommunicator):
            self._bytes = torch.empty(size, dtype=torch.uint8)
            return
        agreed(self.group, lambda: check_room(size, self._bytes.numel()), "shared-memory dispatch")
        self._free()
        self._open(cast("MPI.Intracomm", self.group.mpi_comm), size)

    def view(self, first_byte: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of ``shape`` and ``dtype`` from byte ``first_byte`` of the window on."""
        nbytes = shape[0] * shape[1] * dtype.itemsize
        return self._bytes[first_byte : first_byte + nbytes].view(dtype).view(shape)

    def sync(self) -> None:
        """Order memory accesses; before and after another exchange, that makes it a fence."""
        if self._window is not None:
            self._window.Sync()

    def fence(self) -> None:
        """Wait for every rank; all that any rank wrote before is visible to every rank afterwards."""
        self.start_fence().wait()

    def start_fence(self) -> Pending[None]:
        """Say that this rank has written; ``wait`` returns once every rank has."""
        window = self._window
        if window is None or not isinstance(self.group, MpiCommunicator):
            return Pending(lambda: None)
        window.Sync()
        barrier = self.group.start_barrier()

        def complete() -> None:
            barrier.wait()
            window.Sync()

        return Pending(complete)

    def close(self) -> None:
        """Free the memory; collective. Runs by itself when the process ends."""
        atexit.unregister(self.close)
        self._free()

    def _open(self, comm: "MPI.Intracomm", size: int) -> None:
        from mpi4py import MPI

        # One segment, owned by rank 0: offsets are the same for all ranks, with no gaps between the ranks'
        # parts.
        with cast(MpiCommunicator, self.group).journal_entry("opening a window"):
            self._window = MPI.Win.Allocate_shared(size if comm.rank == 0 else 0, 1, comm=comm)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._bytes = torch.frombuffer(self._window.Shared_query(0)[0], dtype=torch.uint8)

    def _free(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self._window is not None:
            with cast(MpiCommunicator, self.group).journal_entry("closing a window"):
                self._window.Unlock_all()
                self._window.Free()
            self._window = None


def get_window(group: Communicator, use: str = "tokens") -> SharedWindow:
    """Return the window of ``group`` for one ``use``: layers run in turn, so that one serves all."""
    if not isinstance(group, MpiCommunicator):
        return SharedWindow(group)
    key = f"window of {use}"
    if key not in group.resources:
        group.resources[key] = SharedWindow(group)
    return cast(SharedWindow, group.resources[key])


def free_bytes() -> int:
    """Return the bytes that shared windows on this node may still take; 0 without a place."""
    try:
        state = os.statvfs(SHARED_FILES)
    except OSError:
        return 0
    return state.f_bavail * state.f_frsize


def refuse_full_memory() -> None:
    """Raise ValueError if shared memory is full: MPI is killed without any."""
    free = free_bytes()
    if Path(SHARED_FILES).is_dir() and free < LEAST_BYTES:
        raise ValueError(
            f"{SHARED_FILES} on {socket.gethostname()} has {free / 1e6:.1f} MB left, and MPI needs a "
            f"few a rank; remove stale files there (rm {SHARED_FILES}/mpich_shm_* where nothing runs), or "
            "enlarge it (containers: --shm-size)"
        )


def check_room(nbytes: int, reusable: int = 0) -> None:
    """Raise ValueError unless a window of ``nbytes`` fits once ``reusable`` bytes are freed.

    Else the window would open, and its first write to a missing page would kill the process (SIGBUS).
    """
    free = free_bytes() + reusable
    if nbytes > free:
        raise ValueError(
            f"a window of {nbytes / 1e6:.0f} MB does not fit into {SHARED_FILES}, which has {free / 1e6:.0f} "
            "MB left; enlarge it (containers: --shm-size), send fewer tokens at a time, or choose the "
            "dispatcher alltoall"
        )
