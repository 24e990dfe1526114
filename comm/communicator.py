"""The one narrow interface through which tensors travel, and what a transfer in flight is.

Two implementations share it: :class:`xpar.comm.mpi_communicator.MpiCommunicator` on host memory, and
:class:`SoloCommunicator` for a group of one, which needs no MPI at all.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from xpar.comm.handshake import Tag

T = TypeVar("T")
Header = np.ndarray[Any, np.dtype[np.int64]]


class Pending(Generic[T]):
    """A result that is on its way: ``wait`` completes the transfer, once, and returns it."""

    def __init__(self, complete: Callable[[], T]) -> None:
        self._complete: Callable[[], T] | None = complete
        self._value: T | None = None

    def wait(self) -> T:
        if self._complete is not None:
            self._value, self._complete = self._complete(), None
        return self._value  # type: ignore[return-value]


class Communicator(Protocol):
    """Collectives of one named group. Every rank of the group calls them in the same order.

    Row counts, never element counts: a row is ``x[i]``. Any dtype moves; only floating and integer tensors
    reduce, and bf16 and fp16 reduce in fp32 in ascending rank order, so the bits do not depend on timing.
    """

    name: str
    rank: int
    size: int
    world_ranks: tuple[int, ...]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group's ranks, same shape and dtype as ``x``, a new tensor."""

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Rows of all ranks in rank order. ``counts``: rows per rank where all ranks already know them."""

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Sum over ranks of ``x`` [sum(counts), ...]; rank r keeps its ``counts[r]`` rows."""

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        """Rows in destination order leave, rows in source order arrive; both counts are agreed beforehand.

        ``skip``: a rank that nothing goes to and nothing comes from; its rows in ``x`` and its place in ``out`` are
        stepped over.
        """

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """``x`` of ``root`` on every rank; ``x`` gives shape and dtype everywhere and is overwritten."""

    def barrier(self, patient: bool = False) -> None:
        """Return once every rank has called it. ``patient``: sleep meanwhile, so that a rank at work has the cores."""

    def split(self, color: int, key: int, name: str) -> "Communicator":
        """The group of the ranks that gave the same ``color``, ordered by ``key``."""

    def exchange(self, record: Header, tag: "Tag | None" = None) -> Header:
        """[size, len(record)]: every rank's small int64 record. The metadata plane; always on the host.

        ``tag``: what the ranks are doing, for reports.
        """

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's Python object. For start-up and error reports, never a hot path."""

    def abort(self, code: int) -> None:
        """End the whole job now, on every rank, with ``code``."""

    def close(self) -> None:
        """Give back what MPI and the node hold for this group, which nobody uses any more; collective."""


def check_counts(name: str, x: Tensor, counts: Sequence[int], size: int) -> None:
    """Refuse counts that do not describe ``x`` before they reach a collective."""
    if len(counts) != size:
        raise ValueError(f"{name}: {len(counts)} counts for a group of {size} ranks; give one count a rank")
    if any(c < 0 for c in counts) or sum(counts) != x.shape[0]:
        raise ValueError(f"{name}: counts {list(counts)} do not add up to the tensor's {x.shape[0]} rows")


class SoloCommunicator:
    """A group of one: every collective is the identity. Needs no MPI."""

    def __init__(self, name: str = "solo", world_rank: int = 0, abort: Callable[[int], None] | None = None):
        self.name, self.rank, self.size = name, 0, 1
        self.world_ranks: tuple[int, ...] = (world_rank,)
        self._abort = abort

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.clone()

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        if counts is not None:
            check_counts("all_gather_v", x, counts, 1)
        return x

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        check_counts("reduce_scatter_v", x, counts, 1)
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

    def exchange(self, record: Header, tag: "Tag | None" = None) -> Header:
        return record[None]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def abort(self, code: int) -> None:
        if self._abort is None:
            raise SystemExit(code)
        self._abort(code)

    def close(self) -> None:
        return None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which addends of ``dtype`` are summed; raises for dtypes that only travel (fp8, bool)."""
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return torch.float32
    if dtype in (torch.float64, torch.int32, torch.int64):
        return dtype
    raise ValueError(f"{dtype} can be moved but not summed; reduce in float32 and cast afterwards")
