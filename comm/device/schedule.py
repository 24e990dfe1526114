"""The schedule of an exchange as plain numbers, which can be tested without a GPU."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Transfer:
    """A transfer of ``rows`` rows to or from ``peer``, from local row ``first`` on."""

    peer: int
    first: int
    rows: int


@dataclass(frozen=True)
class Schedule:
    """One rank's part of an exchange.

    Transfers without rows are left out on both sides. Peers are visited in rotated order, so that
    not every rank begins with rank 0.

    Attributes:
        sends: Rows to other ranks.
        recvs: Rows from other ranks.
        copy: First row of the source, first row of the target, and number of the rows that this rank
            keeps; None without any.
    """

    sends: tuple[Transfer, ...]
    recvs: tuple[Transfer, ...]
    copy: tuple[int, int, int] | None


def exchange_schedule(
    rank: int, send: Sequence[int], recv: Sequence[int], skip: int | None = None
) -> Schedule:
    """Plan an all-to-all of ``send[r]`` rows to and ``recv[r]`` rows from each rank r.

    Rows leave in the order of destinations and arrive in the order of sources. The rows to and the place
    of rank ``skip`` are stepped over.
    """
    size = len(send)
    source, target = starts(send), starts(recv)
    sends = (Transfer(p, source[p], send[p]) for p in _after(rank, size) if p != skip)
    recvs = (Transfer(p, target[p], recv[p]) for p in _before(rank, size) if p != skip)
    copy = (source[rank], target[rank], send[rank]) if send[rank] and rank != skip else None
    return Schedule(_with_rows(sends), _with_rows(recvs), copy)


def gather_schedule(rank: int, counts: Sequence[int]) -> Schedule:
    """Plan an all-gather of the ``counts[r]`` rows of each rank r, as rank ``rank`` takes part."""
    size, target = len(counts), starts(counts)
    sends = (Transfer(p, 0, counts[rank]) for p in _after(rank, size))
    recvs = (Transfer(p, target[p], counts[p]) for p in _before(rank, size))
    copy = (0, target[rank], counts[rank]) if counts[rank] else None
    return Schedule(_with_rows(sends), _with_rows(recvs), copy)


def starts(counts: Sequence[int]) -> list[int]:
    """Return the first row of each rank when the rows of all ranks lie one after the other."""
    return [0, *accumulate(counts[:-1])]


def _after(rank: int, size: int) -> list[int]:
    return [(rank + i) % size for i in range(1, size)]


def _before(rank: int, size: int) -> list[int]:
    return [(rank - i) % size for i in range(1, size)]


def _with_rows(transfers: Iterable[Transfer]) -> tuple[Transfer, ...]:
    return tuple(t for t in transfers if t.rows)
