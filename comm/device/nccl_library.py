"""The few functions of NCCL that xpar calls, through the low-level bindings of nccl4py.

The bindings take the libnccl that is already in the process. So torch is imported before them, and
both use one copy. The low-level functions are called with plain addresses, because the high-level
ones spend microseconds on each buffer and do not check that it is contiguous.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch  # noqa: F401 - first, so that its libnccl is the one that the bindings find

Comm = Any
SUCCESS, IN_PROGRESS = 0, 7
"""Values of ``ncclResult_t``."""
BYTES = 1
"""``ncclUint8``: rows of any dtype travel as bytes."""
LEAST_VERSION = 22300
"""The first version with ``ncclCommInitRankScalable``."""
ALL_TO_ALL_VERSION = 22803
"""The first version with ``ncclAlltoAll``."""
SHARED_GPU_VERSION = 23003
"""The first version with ``NCCL_MULTI_RANK_GPU_ENABLE``, for several ranks on one GPU."""


class NcclError(RuntimeError):
    """NCCL failed on this rank, or did not finish in time. The group cannot be used any more."""


class Library(Protocol):
    """The functions of NCCL that this package needs.

    Calls on a communicator return before their work is done; :meth:`state` says when it is. Buffers
    are addresses, sizes are bytes, ``stream`` is the handle of a CUDA stream.
    """

    def version(self) -> int:
        """Return the version as ``NCCL_VERSION`` has it: 22809 is 2.28.9."""

    def unique_id(self) -> bytes:
        """Make the identifier that the ranks of a new communicator must have in common."""

    def init(self, size: int, rank: int, unique_id: bytes, blocking: bool) -> Comm:
        """Begin to join a communicator, which is usable once its state is SUCCESS."""

    def state(self, comm: Comm) -> int:
        """Return the ``ncclResult_t`` of the last call on ``comm``."""

    def last_error(self, comm: Comm) -> str:
        """Return NCCL's text about the last error of ``comm``."""

    def group_start(self) -> None:
        """Begin a group: the calls from here on are one operation."""

    def group_end(self) -> None:
        """End the group and start its operation."""

    def send(self, address: int, nbytes: int, peer: int, comm: Comm, stream: int) -> None:
        """Send ``nbytes`` to rank ``peer``."""

    def recv(self, address: int, nbytes: int, peer: int, comm: Comm, stream: int) -> None:
        """Receive ``nbytes`` from rank ``peer``."""

    def all_gather(self, source: int, target: int, nbytes: int, comm: Comm, stream: int) -> None:
        """Gather ``nbytes`` of every rank in rank order."""

    def all_to_all(self, source: int, target: int, nbytes: int, comm: Comm, stream: int) -> None:
        """Exchange ``nbytes`` between every pair of ranks."""

    def abort(self, comm: Comm) -> None:
        """Give ``comm`` up without the other ranks."""

    def finalize(self, comm: Comm) -> None:
        """Begin to finish the operations of ``comm``."""

    def destroy(self, comm: Comm) -> None:
        """Free ``comm`` after :meth:`finalize`."""


@dataclass(frozen=True)
class Nccl4py:
    """Implements :class:`Library` with the module ``nccl.bindings.nccl``."""

    nccl: Any

    def version(self) -> int:
        return int(self.nccl.get_version())

    def path(self) -> str:
        """Return the file of the loaded library."""
        return str(self.nccl.get_library_path() or "unknown file")

    def unique_id(self) -> bytes:
        return bytes(self.nccl.get_unique_id())

    def init(self, size: int, rank: int, unique_id: bytes, blocking: bool) -> Comm:
        config = self.nccl.Config()
        config.blocking = int(blocking)
        return self.nccl.comm_init_rank_scalable(size, rank, 1, bytearray(unique_id), config.ptr)

    def state(self, comm: Comm) -> int:
        return int(self.nccl.comm_get_async_error(comm))

    def last_error(self, comm: Comm) -> str:
        return str(self.nccl.get_last_error(comm))

    def group_start(self) -> None:
        self.nccl.group_start()

    def group_end(self) -> None:
        self.nccl.group_end()

    def send(self, address: int, nbytes: int, peer: int, comm: Comm, stream: int) -> None:
        self.nccl.send(address, nbytes, BYTES, peer, comm, stream)

    def recv(self, address: int, nbytes: int, peer: int, comm: Comm, stream: int) -> None:
        self.nccl.recv(address, nbytes, BYTES, peer, comm, stream)

    def all_gather(self, source: int, target: int, nbytes: int, comm: Comm, stream: int) -> None:
        self.nccl.all_gather(source, target, nbytes, BYTES, comm, stream)

    def all_to_all(self, source: int, target: int, nbytes: int, comm: Comm, stream: int) -> None:
        self.nccl.allto_all(source, target, nbytes, BYTES, comm, stream)

    def abort(self, comm: Comm) -> None:
        self.nccl.comm_abort(comm)

    def finalize(self, comm: Comm) -> None:
        self.nccl.comm_finalize(comm)

    def destroy(self, comm: Comm) -> None:
        self.nccl.comm_destroy(comm)


def open_library() -> Nccl4py:
    """Open NCCL; ValueError, with what is missing and how to get it, if that cannot be."""
    try:
        from nccl.bindings import nccl
    except ImportError as error:
        raise ValueError(
            f"the NCCL bindings cannot be imported ({error}); install them beside torch's own NCCL with "
            "`pip install --no-deps nccl4py cuda-pathfinder`"
        ) from None
    library = Nccl4py(nccl)
    try:
        version = library.version()
    except RuntimeError as error:  # raised by the bindings' loader
        raise ValueError(f"there is no NCCL library: {str(error).splitlines()[0]}") from None
    if version < LEAST_VERSION:
        raise ValueError(
            f"NCCL {version_text(version)} at {library.path()} is too old; "
            f"{version_text(LEAST_VERSION)} or newer is needed"
        )
    return library


def version_text(version: int) -> str:
    """Write a version number as people do: 22809 as "2.28.9"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
