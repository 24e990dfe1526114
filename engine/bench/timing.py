"""Timing several ways of doing one thing in turn, so that a slow minute of the machine falls on all of them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xpar.comm.communicator import Communicator

SETTLE_S = 0.01
"""Threads of a pool spin for some milliseconds after their last work, on cores that other ranks use next."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 60


@dataclass(frozen=True)
class Contender:
    """One way. ``call`` runs batch number n and returns its seconds; ``alone``: rank 0 calls it, the others sleep."""

    name: str
    call: Callable[[int], float]
    alone: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds of every round, those of the slowest rank."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def min_ms(self) -> float:
        return min(self.seconds) * 1e3

    def ratio(self, other: "Times") -> float:
        """How many times longer ``other`` takes: the median over rounds, so that slow moments cancel."""
        return statistics.median(o / s for o, s in zip(other.seconds, self.seconds, strict=True))


def take_turns(
    comm: Communicator, contenders: Sequence[Contender], batches: int, seconds: float
) -> dict[str, Times]:
    """Run every contender once a round on that round's batch; collective. About ``seconds`` long in all.

    Two rounds warm up and say how many rounds fit, at least 5.
    """
    warm = _round(comm, contenders, 0) + _round(comm, contenders, batches - 1)
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(2 * seconds / max(sum(warm), 1e-9))))
    table = [_round(comm, contenders, r % batches) for r in range(rounds)]
    return {c.name: Times(tuple(row[i] for row in table)) for i, c in enumerate(contenders)}


def _round(comm: Communicator, contenders: Sequence[Contender], batch: int) -> list[float]:
    mine = [_once(comm, contender, batch) for contender in contenders]
    return [max(times) for times in zip(*comm.all_gather_object(mine), strict=True)]


def _once(comm: Communicator, contender: Contender, batch: int) -> float:
    comm.barrier()
    if not contender.alone:
        return contender.call(batch)
    elapsed = 0.0
    if comm.rank == 0:
        elapsed = contender.call(batch)
        time.sleep(SETTLE_S)
    comm.barrier(patient=True)
    return elapsed
