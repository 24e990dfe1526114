"""All ranks answering one queue of prompts, in steps that they take together.

The experts of a layer are spread over the ranks, so every rank must take part in every forward of any other.
A step is one small exchange and one forward on each rank: of new prompts, of its running ones, or of none.
From what was exchanged each rank derives the same facts: who gets which prompts, whether anything is left,
whether to stop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.step_agreement import agree_step
from xpar.engine.generation.steps import LocalBatch, R

FLUSH_S = 1.0
"""Answers travel to the rank that writes them at least this often, if there are any."""

Record = dict[str, Any]

Deal = Callable[[Sequence[int]], list[list[int]]]
"""Prompts that each rank would begin -> each rank's places of the queue."""

STOP, FLUSH = 1, 2


@dataclass(frozen=True)
class Progress:
    """The job before a step: prompts answered, tokens drawn, and (token, expert) pairs of each rank."""

    done: int
    tokens: int
    slots: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """The pairs of the busiest rank over the mean of all ranks."""
        return max(self.slots) * len(self.slots) / max(1, sum(self.slots))


@dataclass(frozen=True)
class LockstepCallbacks(Generic[R]):
    """The functions that the loop calls.

    Attributes:
        total: Prompts in the queue; the same on all ranks.
        start: Makes the row of the prompt at a place of the queue.
        length: Says how many tokens the prompt at a place of the queue has.
        at_once: Says how many prompts a rank may begin in one step, if the one at a given place is the
            longest of them.
        record: Makes what is written of a complete row.
        write: Writes records. It is called on rank 0 only, with those of all ranks.
        stop: Says whether this rank was told to stop.
        tell: Receives the job's progress before each step, for a progress bar.
        deal: Deals prompts to ranks that want so many, as places of the queue; it remembers what it has
            dealt, and is the same on all ranks. By default prompts are dealt in order, one each in turn.
    """

    total: int
    start: Callable[[int], R]
    length: Callable[[int], int]
    at_once: Callable[[int], int]
    record: Callable[[R], Record]
    write: Callable[[list[Record]], None]
    stop: Callable[[], bool]
    tell: Callable[[Progress], None]
    deal: Deal | None = None


def run_lockstep(comm: Communicator, sequences: LocalBatch[R], batch: int, job: LockstepCallbacks[R]) -> bool:
    """Answer prompts 0 to ``job.total`` - 1, at most ``batch`` at a time on each rank.

    Collective over ``comm``.

    Returns False if a rank was told to stop before all were done; what was complete by then is written.
    """
    try:
        return _answer(comm, sequences, batch, job)
    finally:
        sequences.agree(None, ())  # layers that are called outside of these steps agree for themselves again


def _answer(comm: Communicator, sequences: LocalBatch[R], batch: int, job: LockstepCallbacks[R]) -> bool:
    answers: list[Record] = []
    written = step = 0
    deal = job.deal or QueueDealer(job.total, job.at_once).deal
    last = time.monotonic()
    while True:
        wishes = STOP * job.stop() + FLUSH * (comm.rank == 0 and time.monotonic() - last > FLUSH_S)
        # Besides what every step says: answers kept back here, tokens drawn, (token, expert) pairs computed,
        # whether a recorded step can be replayed, and prompts that would be begun.
        tokens_of_rank = sequences.next_tokens
        wanted = sequences.wanted(batch)
        notes = (len(answers), sequences.tokens, sequences.slots(), sequences.readiness(), wanted)
        work = sequences.occupied
        facts = agree_step(comm, step, tokens=tokens_of_rank, work=work, status=wishes, notes=notes)
        kept, tokens, slots, readiness, free = zip(*facts.notes, strict=True)
        stop = bool(facts.status & STOP)
        parts = deal(free)
        over = stop or not (facts.any_work or any(parts))
        job.tell(Progress(written + sum(kept), sum(tokens), slots))
        if any(kept) and (over or facts.status & FLUSH):
            _collect(comm, answers, job.write)
            answers, written, last = [], written + sum(kept), time.monotonic()
        if over:
            return not stop
        counts = tuple(
            sequences.tokens_of([job.length(place) for place in part], tokens) if part else tokens
            for part, tokens in zip(parts, facts.tokens, strict=True)
        )
        sequences.agree(counts, (0,) * comm.size if any(parts) else readiness)
        complete = _forward(sequences, [job.start(place) for place in parts[comm.rank]])
        answers += [job.record(r) for r in complete]
        step += 1


class QueueDealer:
    """Deals prompts 0 to ``total`` - 1 in order; ``at_once`` as for :class:`LockstepCallbacks`."""

    def __init__(self, total: int, at_once: Callable[[int], int]) -> None:
        self._total, self._at_once, self._given = total, at_once, 0

    def deal(self, wanted: Sequence[int]) -> list[list[int]]:
        """Deal prompts to ranks that want so many; return each rank's places of the queue."""
        if self._given >= self._total:
            return [[] for _ in wanted]
        most = self._at_once(self._given)
        parts = deal_prompts([min(most, free) for free in wanted], self._total - self._given)
        dealt = []
        for part in parts:
            dealt.append(list(range(self._given, self._given + part)))
            self._given += part
        return dealt


def deal_prompts(free: Sequence[int], left: int) -> list[int]:
    """Deal the ``left`` next prompts to the ranks, one each in turn, to ranks that have a free slot."""
    parts = [0] * len(free)
    while left > 0 and any(part < slots for part, slots in zip(parts, free, strict=True)):
        for rank, slots in enumerate(free):
            if parts[rank] < slots and left > 0:
                parts[rank] += 1
                left -= 1
    return parts


def _forward(sequences: LocalBatch[R], new: list[R]) -> list[R]:
    if new:
        return sequences.begin(new)
    if sequences.occupied:
        return sequences.advance()
    sequences.join()
    return []


def _collect(comm: Communicator, answers: list[Record], write: Callable[[list[Record]], None]) -> None:
    """Have rank 0 write every rank's answers; if it cannot, all ranks raise one error."""
    everyones = [record for part in comm.all_gather_object(answers) for record in part]
    agreed(comm, lambda: write(everyones) if comm.rank == 0 else None, "writing answers")
