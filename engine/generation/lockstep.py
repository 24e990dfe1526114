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
    """

    total: int
    start: Callable[[int], R]
    length: Callable[[int], int]
    at_once: Callable[[int], int]
    record: Callable[[R], Record]
    write: Callable[[list[Record]], None]
    stop: Callable[[], bool]
    tell: Callable[[Progress], None]


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
    given = written = step = 0
    last = time.monotonic()
    while True:
        wishes = STOP * job.stop() + FLUSH * (comm.rank == 0 and time.monotonic() - last > FLUSH_S)
        # Besides what every step says: answers kept back here, tokens drawn, (token, expert) pairs computed,
        # and whether a recorded step can be replayed.
        notes = (len(answers), sequences.tokens, sequences.slots(), sequences.readiness())
        work, tokens_of_rank = sequences.occupied, sequences.next_tokens
        facts = agree_step(comm, step, tokens=tokens_of_rank, work=work, status=wishes, notes=notes)
        kept, tokens, slots, readiness = zip(*facts.notes, strict=True)
        stop = bool(facts.status & STOP)
        most = job.at_once(given) if given < job.total else 0
        parts = deal_prompts([min(most, batch - running) for running in facts.work], job.total - given)
        over = stop or not (facts.any_work or any(parts))
        job.tell(Progress(written + sum(kept), sum(tokens), slots))
        if any(kept) and (over or facts.status & FLUSH):
            _collect(comm, answers, job.write)
            answers, written, last = [], written + sum(kept), time.monotonic()
        if over:
            return not stop
        counts = _count_tokens(sequences, job, facts.tokens, parts, given)
        sequences.agree(counts, (0,) * comm.size if any(parts) else readiness)
        first = given + sum(parts[: comm.rank])
        given += sum(parts)
        complete = _forward(sequences, [job.start(place) for place in range(first, first + parts[comm.rank])])
        answers += [job.record(r) for r in complete]
        step += 1


def deal_prompts(free: Sequence[int], left: int) -> list[int]:
    """Deal the ``left`` next prompts to the ranks, one each in turn, to ranks that have a free slot."""
    parts = [0] * len(free)
    while left > 0 and any(part < slots for part, slots in zip(parts, free, strict=True)):
        for rank, slots in enumerate(free):
            if parts[rank] < slots and left > 0:
                parts[rank] += 1
                left -= 1
    return parts


def _count_tokens(
    sequences: LocalBatch[R],
    job: LockstepCallbacks[R],
    continued: Sequence[int],
    parts: Sequence[int],
    given: int,
) -> tuple[int, ...]:
    """Return the tokens of each rank in a step: of the prompts that it begins, or of what it continues.

    ``parts``: prompts that each rank begins, from place ``given`` of the queue on.
    """
    counts = []
    for tokens, part in zip(continued, parts, strict=True):
        lengths = [job.length(place) for place in range(given, given + part)]
        counts.append(sequences.tokens_of(lengths) if part else tokens)
        given += part
    return tuple(counts)


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
