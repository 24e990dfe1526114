"""Working through a file on all ranks, into a file that loses nothing: what answering and scoring have in common."""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.generation.answer_file import AnswerFile
from xpar.engine.generation.lockstep import LockstepCallbacks, Progress, Record, run_lockstep
from xpar.engine.generation.request import RequestBase, WorkItem, Workload
from xpar.engine.generation.steps import LocalBatch, R


@dataclass(frozen=True)
class RunSummary:
    """``complete``: False if a signal ended it early. ``progress``: of this run, at its end.

    ``failed``: prompts that the model could not answer.
    """

    complete: bool
    progress: Progress
    seconds: float
    failed: int = 0

    @property
    def answers(self) -> int:
        return self.progress.done - self.failed

    @property
    def tokens(self) -> int:
        return self.progress.tokens


@dataclass(frozen=True)
class BatchLimits:
    """``batch``: questions that a rank has in hand at a time. ``tokens``: of those that it begins in one step."""

    batch: int
    tokens: int


def process_file(
    comm: Communicator,
    request: RequestBase,
    work: Workload,
    steps: LocalBatch[R],
    limits: BatchLimits,
    start: Callable[[int, WorkItem], R],
    record: Callable[[R], Record],
    told: Callable[[], bool],
    tell: Callable[[Progress], None],
) -> RunSummary:
    """Have ``steps`` work on all of ``work.queue``, and the records of it in ``request.out``; collective.

    ``start(place, question)``: what ``steps`` begins for a question. ``record``: what is written of a complete one.
    ``told``: whether this rank was told to stop; if any was, all end after the step they are in, with everything
    written that was complete. ``tell`` hears where the job is before each step. A row that the model could not work on,
    or whose record cannot be made, is written as a failure beside ``request.out``, and the others go on.
    """
    file = agreed(comm, lambda: AnswerFile(request.out) if comm.rank == 0 else None)
    begin = time.monotonic()
    latest = Progress(0, 0, (0,) * comm.size)

    def note(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        tell(progress)

    job = LockstepCallbacks(
        total=len(work.queue),
        start=lambda place: start(place, work.queue[place]),
        at_once=lambda place: max(1, limits.tokens // len(work.queue[place].ids)),
        record=lambda row: _record_or_failure(row, work, record),
        write=lambda records: file.append(records) if file else None,
        stop=told,
        tell=note,
    )
    complete = run_lockstep(comm, steps, limits.batch, job)
    agreed(comm, lambda: _close(file, complete, work.order), "writing answers")
    failed = comm.all_gather_object(file.failed if file else 0)[0]
    return RunSummary(complete, latest, time.monotonic() - begin, failed)


def finish_only(comm: Communicator, request: RequestBase, work: Workload) -> None:
    """Put a file that has every answer already into the order of the prompts; collective."""

    def finish() -> None:
        if comm.rank == 0:
            AnswerFile(request.out).finish(work.order)

    agreed(comm, finish, "writing answers")


def first_line(question: WorkItem) -> Record:
    """How a record begins: which line it is about."""
    name = question.prompt.id
    return {"line": question.prompt.line, **({} if name is None else {"id": name})}


def last_line(question: WorkItem, work: Workload) -> Record:
    """How a record ends: what a later run compares."""
    return {"hash": question.hash, "settings": work.settings}


def _record_or_failure(row: R, work: Workload, record: Callable[[R], Record]) -> Record:
    question, why = work.queue[row.place], row.failure
    if why is None:
        try:
            return record(row)
        except Exception as error:  # noqa: BLE001 - one row's answer must not end the job
            why = f"its answer cannot be written ({type(error).__name__}: {error})"
    return {**first_line(question), "error": why, **last_line(question, work)}


def watch_for_stop() -> Callable[[], bool]:
    """Whether this process has been sent SIGTERM, which from now on does nothing else.

    To its very end: a job that is pre-empted while MPI shuts down has lost nothing, and must not look as if it had.
    """
    told = False

    def remember(*_: object) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, remember)
    return lambda: told


def _close(file: AnswerFile | None, complete: bool, order: Mapping[str, int]) -> None:
    if file is None:
        return
    if complete:
        file.finish(order)
    else:
        file.close()
