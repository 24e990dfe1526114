"""The lateness of ranks: how much later than the first each came to collectives.

Clocks of different nodes differ, so times of day say nothing. But all ranks leave a collective at about the
same time: the rank that waited least came last, and the difference of the waits is its lateness.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xpar.comm.communicator import Communicator
from xpar.comm.watchdog.watchdog import Watchdog

Group = tuple[str, tuple[int, ...]]
"""A group's name and world ranks."""


@dataclass(frozen=True)
class Lateness:
    """The delays with which world rank ``rank`` came to ``collectives`` that were compared.

    ``p50``, ``p99``: percentiles in seconds. ``last``: share of them to which the rank came last, 0 to 1.
    """

    rank: int
    collectives: int
    p50: float
    p99: float
    last: float


def gather_lateness(comm: Communicator, watchdog: Watchdog) -> list[Lateness]:
    """Compare the waits of all ranks since the last call, in rank order, and empty the journals.

    Collective over ``comm``, the group of all ranks.
    """
    return lateness(comm.all_gather_object(watchdog.take_waits()))


def lateness(waits_of_ranks: Sequence[Mapping[Group, Sequence[float]]]) -> list[Lateness]:
    """Compute every rank's lateness from the seconds that each rank waited in each collective of its groups.

    A group's waits are there for all of its ranks or for none.
    """
    late: list[list[np.ndarray]] = [[] for _ in waits_of_ranks]
    for name, ranks in sorted({group for waits in waits_of_ranks for group in waits}):
        waits = [waits_of_ranks[r][name, ranks] for r in ranks]
        if len({len(w) for w in waits}) > 1:
            continue  # a rank that is alone in another group does not know the step; nothing can be compared
        table = np.array(waits)  # [ranks, collectives]
        behind = table.max(axis=0) - table
        for r, row in zip(ranks, behind, strict=True):
            late[r].append(np.stack([row, row == behind.max(axis=0)]))
    return [_of_rank(rank, np.concatenate(parts, axis=1)) for rank, parts in enumerate(late) if parts]


def _of_rank(rank: int, rows: np.ndarray) -> Lateness:
    """Summarise ``rows`` [2, collectives]: seconds late, and whether the rank came last."""
    if not rows.shape[1]:
        return Lateness(rank, 0, 0.0, 0.0, 0.0)
    p50, p99 = np.percentile(rows[0], [50, 99])
    return Lateness(rank, rows.shape[1], float(p50), float(p99), float(rows[1].mean()))
