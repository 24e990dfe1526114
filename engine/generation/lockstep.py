"""All ranks answering one queue of prompts, in steps that they take together.

The experts of a layer are spread over the ranks, so every rank must take part in every forward of any other.
A step is one small exchange and one forward on each rank: of new prompts, of its running ones, or of none.
From what was exchanged each rank derives the same facts: who gets which prompts, whether anything is left,
whether to stop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.step_agreement import agree_step
from xpar.engine.generation.answer_form import Result
from xpar.engine.generation.steps import LocalBatch, R

FLUSH_S = 1.0
"""Seconds: results are gathered and written at the first step that begins later than this after the last."""

Deal = Callable[[Sequence[int]], list[list[int]]]
"""Prompts that each rank would begin -> each rank's places of the queue."""

STOP, FLUSH = 1, 2


class StepNotes(NamedTuple):
    """The numbers that a rank adds to the agreement on a step, besides its tokens and its work.

    Attributes:
        unwritten: Results that this rank has and that are not written yet.
        drawn: Tokens drawn so far.
        slots: (token, expert) pairs that its experts have computed.
        readiness: The bits that say whether it can record or replay the step.
        wanted: Prompts that it would begin.
    """

    unwritten: int
    drawn: int
    slots: int
    readiness: int
    wanted: int


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
        make_result: Makes what is written of a complete row.
        write: Writes results. It is called on rank 0 only, with those of all ranks.
        stop: Says whether this rank was told to stop.
        report_progress: Receives the job's progress before each step, for a progress bar.
        deal: Deals prompts to ranks that want so many, as places of the queue; it remembers what it has
            dealt, and is the same on all ranks. By default prompts are dealt in order, one each in turn.
    """

    total: int
    start: Callable[[int], R]
    length: Callable[[int], int]
    at_once: Callable[[int], int]
    make_result: Callable[[R], Result]
    write: Callable[[list[Result]], None]
    stop: Callable[[], bool]
    report_progress: Callable[[Progress], None]
    deal: Deal | None = None


def run_lockstep(comm: Communicator, batch: LocalBatch[R], most_rows: int, job: LockstepCallbacks[R]) -> bool:
    """Answer prompts 0 to ``job.total`` - 1, at most ``most_rows`` at a time on each rank.

    Collective over ``comm``.

    Returns False if a rank was told to stop before all were done; what was complete by then is written.
    """
    try:
        return _answer(comm, batch, most_rows, job)
    finally:
        batch.agree(None, ())  # layers that are called outside of these steps agree for themselves again


def _answer(comm: Communicator, batch: LocalBatch[R], most_rows: int, job: LockstepCallbacks[R]) -> bool:
    results: list[Result] = []
    written = step = 0
    deal = job.deal or QueueDealer(job.total, job.at_once).deal
    last = time.monotonic()
    while True:
        status = STOP * job.stop() + FLUSH * (comm.rank == 0 and time.monotonic() - last > FLUSH_S)
        tokens, wanted = batch.next_tokens, batch.wanted(most_rows)
        own = StepNotes(len(results), batch.tokens, batch.slots(), batch.readiness(), wanted)
        facts = agree_step(comm, step, tokens=tokens, work=batch.occupied, status=status, notes=own)
        notes = [StepNotes(*numbers) for numbers in facts.notes]
        unwritten = sum(rank.unwritten for rank in notes)
        stop = bool(facts.status & STOP)
        parts = deal([rank.wanted for rank in notes])
        over = stop or not (facts.any_work or any(parts))
        slots = tuple(rank.slots for rank in notes)
        job.report_progress(Progress(written + unwritten, sum(rank.drawn for rank in notes), slots))
        if unwritten and (over or facts.status & FLUSH):
            _collect(comm, results, job.write)
            results, written, last = [], written + unwritten, time.monotonic()
        if over:
            return not stop
        counts = tuple(
            batch.tokens_of([job.length(place) for place in part], continued) if part else continued
            for part, continued in zip(parts, facts.tokens, strict=True)
        )
        readiness = tuple(0 if any(parts) else rank.readiness for rank in notes)
        batch.agree(counts, readiness)
        complete = _forward(batch, [job.start(place) for place in parts[comm.rank]])
        results += [job.make_result(row) for row in complete]
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


def deal_prompts(most: Sequence[int], left: int) -> list[int]:
    """Deal the ``left`` next prompts to the ranks, one each in turn; return how many each gets.

    ``most``: how many each rank takes at most.
    """
    parts = [0] * len(most)
    while left > 0 and any(part < limit for part, limit in zip(parts, most, strict=True)):
        for rank, limit in enumerate(most):
            if parts[rank] < limit and left > 0:
                parts[rank] += 1
                left -= 1
    return parts


def _forward(batch: LocalBatch[R], new: list[R]) -> list[R]:
    if new:
        return batch.begin(new)
    if batch.occupied:
        return batch.advance()
    batch.join()
    return []


def _collect(comm: Communicator, results: list[Result], write: Callable[[list[Result]], None]) -> None:
    """Gather the results of all ranks on every rank, and write them on rank 0; one error if it cannot."""
    everyones = [result for part in comm.all_gather_object(results) for result in part]
    agreed(comm, lambda: write(everyones) if comm.rank == 0 else None, "writing answers")
