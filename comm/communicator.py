"""The one narrow interface through which tensors travel between ranks.

Three classes implement :class:`Communicator`: :class:`xpar.comm.mpi_communicator.MpiCommunicator` for host
memory, :class:`xpar.comm.device.communicator.DeviceCommunicator` for GPU memory, and
:class:`SoloCommunicator` for a group of one rank, which needs no MPI.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Header = np.ndarray[Any, np.dtype[np.int64]]
"""The int64 vector that every rank contributes to a handshake."""


@dataclass(frozen=True)
class Tag:
    """The collective that a rank believes it is in, for comparisons and reports.

    Attributes:
        op: Name of the operation.
        layer: Index of the layer, -1 outside layers.
        step: Number of the layer's step, -1 outside steps.
        rows: Rows that this rank brings; for reports alone, as are the ``row_bytes`` of one.
    """

    op: str
    layer: int = -1
    step: int = -1
    rows: int = 0
    row_bytes: int = 0

    def __str__(self) -> str:
        return (
            self.op
            + (f" layer {self.layer}" if self.layer >= 0 else "")
            + (f" step {self.step}" if self.step >= 0 else "")
        )

    def words(self) -> tuple[int, int, int]:
        """Return the numbers that all ranks must agree on: hash of ``op``, layer and step."""
        return zlib.crc32(self.op.encode()), self.layer, self.step


class Pending(Generic[T]):
    """The result of a transfer that has been started."""

    def __init__(self, complete: Callable[[], T]) -> None:
        self._complete: Callable[[], T] | None = complete
        self._value: T | None = None

    def wait(self) -> T:
        """Complete the transfer if that has not been done, and return its result."""
        if self._complete is not None:
            self._value, self._complete = self._complete(), None
        return self._value  # type: ignore[return-value]


class Communicator(Protocol):
    """The collectives of one named group of ranks.

    Every rank of the group calls them in the same order. Counts are counts of rows, never of elements; a row
    is ``x[i]``. Tensors of any dtype can be moved. Only floating and integer tensors can be summed. Addends
    in bf16 and fp16 are summed in fp32 in ascending rank order, so that the bits do not depend on timing.

    Attributes:
        name: Name of the group, the same on all of its ranks.
        rank: This process's rank in the group.
        size: Number of ranks in the group.
        world_ranks: The world rank of every rank of the group.
    """

    name: str
    rank: int
    size: int
    world_ranks: tuple[int, ...]

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the group's ranks into a new tensor of the same shape and dtype."""

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Return the rows of all ranks in rank order; ``counts`` of them, if all ranks know."""

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int], planned: bool = False) -> Tensor:
        """Sum ``x`` [sum(counts), ...] over the ranks; rank r gets ``counts[r]`` rows of the sum.

        ``planned``: the ranks have agreed on the sizes before.
        """

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        """Start to send rows to every rank and to receive rows from every rank.

        Args:
            x: Rows to send [sum(send_counts), ...], in the order of their destinations.
            send_counts: Rows to each rank.
            recv_counts: Rows from each rank; the ranks have agreed on both counts before.
            out: Contiguous memory for the received rows [sum(recv_counts), ...]; new memory by default.
            skip: A rank with which no row is exchanged. Its rows in ``x`` and its place in ``out`` are
                stepped over.

        Returns:
            The received rows in the order of their sources, once they are here.
        """

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """Overwrite ``x``, of the same shape and dtype on every rank, with that of rank ``root``."""

    def barrier(self, patient: bool = False) -> None:
        """Wait for every rank; sleep meanwhile if ``patient``, so that others have the cores."""

    def split(self, color: int, key: int, name: str) -> "Communicator":
        """Make the group of the ranks that give the same ``color``, ordered by ``key``; collective."""

    def exchange(self, header: Header, tag: Tag | None = None) -> Header:
        """All-gather a small int64 vector [N] per rank, always on the host: [size, N]."""

    def enter_step(self, tag: Tag) -> None:
        """Count the collectives from now on to the layer and step of ``tag``, without any exchange."""

    def checks_collectives(self) -> bool:
        """Return whether all ranks compare every collective before it begins."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the Python object of every rank; for start-up and errors, too slow for steps."""

    def abort(self, code: int) -> None:
        """End the whole job now, on every rank, with exit code ``code``."""

    def close(self) -> None:
        """Free what MPI and the node hold for this group, which ends its use; collective."""


def check_counts(name: str, x: Tensor, counts: Sequence[int], size: int) -> None:
    """Raise ValueError unless ``counts`` are ``size`` counts that add up to the rows of ``x``."""
    if len(counts) != size:
        raise ValueError(f"{name}: {len(counts)} counts for a group of {size} ranks; give one count a rank")
    if any(c < 0 for c in counts) or sum(counts) != x.shape[0]:
        raise ValueError(f"{name}: counts {list(counts)} do not add up to the tensor's {x.shape[0]} rows")


class SoloCommunicator:
    """A :class:`Communicator` of one rank: each collective is the identity, without MPI."""

    def __init__(self, name: str = "solo", world_rank: int = 0, abort: Callable[[int], None] | None = None):
        self.name, self.rank, self.size = name, 0, 1
        self.world_ranks: tuple[int, ...] = (world_rank,)
        self._abort = abort

    def all_reduce(self, x: Tensor) -> Tensor:
        accumulation_dtype(x.dtype)
        return x.clone()

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        if counts is not None:
            check_counts("all_gather_v", x, counts, 1)
        return x

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int], planned: bool = False) -> Tensor:
        check_counts("reduce_scatter_v", x, counts, 1)
        accumulation_dtype(x.dtype)
        return x

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        check_counts("all_to_all_v", x, send_counts, 1)
        if skip == 0 and out is not None:
            return Pending(lambda: out)
        check_counts("all_to_all_v", x, recv_counts, 1)
        return Pending(lambda: x if out is None else out.copy_(x))

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        if root != 0:
            raise ValueError(f"broadcast: root {root} in a group of 1 rank; use root 0")
        return x

    def barrier(self, patient: bool = False) -> None:
        return None

    def split(self, color: int, key: int, name: str) -> Communicator:
        return SoloCommunicator(name, self.world_ranks[0], self._abort)

    def exchange(self, header: Header, tag: Tag | None = None) -> Header:
        return header[None]

    def enter_step(self, tag: Tag) -> None:
        return None

    def checks_collectives(self) -> bool:
        return False

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def abort(self, code: int) -> None:
        if self._abort is None:
            raise SystemExit(code)
        self._abort(code)

    def close(self) -> None:
        return None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum ``dtype`` in; ValueError if it can only be moved (fp8, bool)."""
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return torch.float32
    if dtype in (torch.float64, torch.int32, torch.int64):
        return dtype
    raise ValueError(f"{dtype} can be moved but not summed; reduce in float32 and cast afterwards")
