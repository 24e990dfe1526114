"""Who sends which rows to whom, as plain numbers: the part of an exchange that can be wrong and needs no GPU."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Transfer:
    """``rows`` rows, beginning with row ``first`` of the local buffer, to or from ``peer``."""

    peer: int
    first: int
    rows: int


@dataclass(frozen=True)
class Schedule:
    """One rank's part of an exchange. A transfer of no rows appears on neither side; own rows are copied, not sent.

    Peers are visited in rotated order, so that not every rank begins with rank 0. ``copy``: (first row of the source,
    first row of the target, rows), or None.
    """

    sends: tuple[Transfer, ...]
    recvs: tuple[Transfer, ...]
    copy: tuple[int, int, int] | None


def exchange_schedule(
    rank: int, send: Sequence[int], recv: Sequence[int], skip: int | None = None
) -> Schedule:
    """Rows in destination order leave, rows in source order arrive; those to and from ``skip`` stay where they are."""
    size = len(send)
    out_of, into = starts(send), starts(recv)
    sends = (Transfer(p, out_of[p], send[p]) for p in _after(rank, size) if p != skip)
    recvs = (Transfer(p, into[p], recv[p]) for p in _before(rank, size) if p != skip)
    copy = (out_of[rank], into[rank], send[rank]) if send[rank] and rank != skip else None
    return Schedule(_real(sends), _real(recvs), copy)


def gather_schedule(rank: int, counts: Sequence[int]) -> Schedule:
    """Every rank's rows go to every rank; ``counts[r]`` rows of rank r."""
    size, into = len(counts), starts(counts)
    sends = (Transfer(p, 0, counts[rank]) for p in _after(rank, size))
    recvs = (Transfer(p, into[p], counts[p]) for p in _before(rank, size))
    copy = (0, into[rank], counts[rank]) if counts[rank] else None
    return Schedule(_real(sends), _real(recvs), copy)


def starts(counts: Sequence[int]) -> list[int]:
    """Where each rank's rows begin when they lie one after the other."""
    return [0, *accumulate(counts[:-1])]


def _after(rank: int, size: int) -> list[int]:
    return [(rank + i) % size for i in range(1, size)]


def _before(rank: int, size: int) -> list[int]:
    return [(rank - i) % size for i in range(1, size)]


def _real(transfers: Iterable[Transfer]) -> tuple[Transfer, ...]:
    return tuple(t for t in transfers if t.rows)
