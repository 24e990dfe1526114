"""The few functions of NCCL that xpar calls, through the low-level bindings of nccl4py.

The bindings take the libnccl that is already in the process, so torch is imported before them and both use one copy.
They are called with plain addresses: the high-level ones spend microseconds a buffer and check no contiguity.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch  # noqa: F401 - first, so that its libnccl is the one that the bindings find

Comm = Any
SUCCESS, IN_PROGRESS = 0, 7
"""``ncclResult_t``."""
BYTES = 1
"""``ncclUint8``: rows travel as bytes, whatever their dtype."""
LEAST_VERSION = 22300
"""``ncclCommInitRankScalable``."""
ALL_TO_ALL_VERSION = 22803
"""``ncclAlltoAll``."""
SHARED_GPU_VERSION = 23003
"""``NCCL_MULTI_RANK_GPU_ENABLE``: several ranks on one GPU."""


class NcclError(RuntimeError):
    """NCCL failed on this rank, or did not finish in time. The group cannot be used any more."""


class Library(Protocol):
    """NCCL as this package needs it. Calls on a communicator return before it is done: :meth:`state` says when.

    Buffers are addresses, sizes are bytes, ``stream`` is a CUDA stream handle.
    """

    def version(self) -> int:
        """As ``NCCL_VERSION``: 22809 is 2.28.9."""

    def unique_id(self) -> bytes:
        """What the ranks of a new communicator must share."""

    def init(self, size: int, rank: int, unique_id: bytes, blocking: bool) -> Comm:
        """Begin to join; the communicator is usable once its state is SUCCESS."""

    def state(self, comm: Comm) -> int:
        """The ``ncclResult_t`` of what was last asked of ``comm``."""

    def last_error(self, comm: Comm) -> str:
        """What NCCL says went wrong."""

    def group_start(self) -> None:
        """Calls from here on are one operation."""

    def group_end(self) -> None:
        """Start that operation."""

    def send(self, address: int, nbytes: int, peer: int, comm: Comm, stream: int) -> None: ...

    def recv(self, address: int, nbytes: int, peer: int, comm: Comm, stream: int) -> None: ...

    def all_gather(self, source: int, target: int, nbytes: int, comm: Comm, stream: int) -> None:
        """``nbytes`` of every rank, in rank order."""

    def all_to_all(self, source: int, target: int, nbytes: int, comm: Comm, stream: int) -> None:
        """``nbytes`` between every pair of ranks."""

    def abort(self, comm: Comm) -> None:
        """Give up, without the other ranks."""

    def finalize(self, comm: Comm) -> None:
        """Begin to finish what is under way."""

    def destroy(self, comm: Comm) -> None:
        """Free; after :meth:`finalize`."""


@dataclass(frozen=True)
class Nccl4py:
    """:class:`Library` on the module ``nccl.bindings.nccl``."""

    nccl: Any

    def version(self) -> int:
        return int(self.nccl.get_version())

    def path(self) -> str:
        """The file that is loaded."""
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
    """The bindings with a library behind them. Raises ValueError that says what is missing and how to get it."""
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
            f"NCCL {version_text(version)} at {library.path()} is too old; {version_text(LEAST_VERSION)} or newer is needed"
        )
    return library


def version_text(version: int) -> str:
    """22809 -> "2.28.9"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
