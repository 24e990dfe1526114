"""Who keeps the others waiting: how much later than the first each rank came to the collectives of its groups.

Clocks of different nodes differ, so times of day say nothing. But all ranks leave a collective at about the same time:
whoever waited least came last, and by how much is the difference of the waits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xpar.comm.communicator import Communicator
from xpar.comm.watchdog.watchdog import Watchdog

Group = tuple[str, tuple[int, ...]]
"""A group's name and ranks."""


@dataclass(frozen=True)
class Lateness:
    """Of one rank over ``collectives``, in seconds: median and 99th percentile. ``last``: share in which it came last."""

    rank: int
    collectives: int
    p50: float
    p99: float
    last: float


def gather_lateness(comm: Communicator, guard: Watchdog) -> list[Lateness]:
    """Of every rank of the job, in order; collective over ``comm``, the group of all ranks. Empties the journals."""
    return lateness(comm.all_gather_object(guard.take_waits()))


def lateness(everyones: Sequence[Mapping[Group, Sequence[float]]]) -> list[Lateness]:
    """From every rank's waits, seconds in each collective of each group it is in; groups have all their ranks' or none."""
    late: list[list[np.ndarray]] = [[] for _ in everyones]
    for name, ranks in sorted({group for waits in everyones for group in waits}):
        waits = [everyones[r][name, ranks] for r in ranks]
        if len({len(w) for w in waits}) > 1:
            continue  # a rank of its own elsewhere does not know the step; nothing can be compared
        table = np.array(waits)  # [ranks, collectives]
        behind = table.max(axis=0) - table
        for r, row in zip(ranks, behind, strict=True):
            late[r].append(np.stack([row, row == behind.max(axis=0)]))
    return [_of_rank(rank, np.concatenate(parts, axis=1)) for rank, parts in enumerate(late) if parts]


def _of_rank(rank: int, rows: np.ndarray) -> Lateness:
    if not rows.shape[1]:
        return Lateness(rank, 0, 0.0, 0.0, 0.0)
    p50, p99 = np.percentile(rows[0], [50, 99])
    return Lateness(rank, rows.shape[1], float(p50), float(p99), float(rows[1].mean()))
