"""The work through a file of questions on all ranks, which answering and scoring share."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.generation.answer_file import AnswerFile
from xpar.engine.generation.answer_form import Choice
from xpar.engine.generation.lockstep import Deal, LockstepCallbacks, Progress, Record, run_lockstep
from xpar.engine.generation.request import RequestBase, Workload
from xpar.engine.generation.samples import sample_record
from xpar.engine.generation.steps import LocalBatch, R
from xpar.engine.generation.work_item import WorkItem


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a run, the same on every rank; not ``complete`` if a signal ended it early.

    ``answers``: how many prompts were answered. ``failed``: how many the model could not answer.
    """

    complete: bool
    progress: Progress
    seconds: float
    answers: int
    failed: int = 0

    @property
    def tokens(self) -> int:
        return self.progress.tokens


@dataclass(frozen=True)
class BatchLimits:
    """The most questions that a rank processes at a time, and the most tokens that it begins in one step."""

    batch: int
    tokens: int


def process_file(
    comm: Communicator,
    request: RequestBase,
    work: Workload,
    steps: LocalBatch[R],
    limits: BatchLimits,
    start: Callable[[int, WorkItem], R],
    choice: Callable[[R], Choice],
    stop_requested: Callable[[], bool],
    on_progress: Callable[[Progress], None],
    deal: Deal | None = None,
) -> RunSummary:
    """Process all of ``work.queue`` with ``steps`` and write the records into ``request.out``. Collective.

    A row that the model could not process, or whose record cannot be made, is written as a failure beside
    ``request.out``; the others go on.

    Args:
        comm: All ranks of the job.
        request: The files and options.
        work: The questions, the same on every rank.
        steps: This rank's batch.
        limits: How much of the queue a rank may hold.
        start: Makes the row that ``steps`` begins from the place of a question in the queue and the question.
        choice: Makes what the record of a complete row says of it.
        stop_requested: Returns whether this rank was asked to stop. If any rank was, all ranks end after the
            current step, with every complete row written.
        on_progress: Is called with the job's progress before each step.
        deal: Deals questions to ranks; by default in the order of the queue.
    """
    several = {q.hash: q for q in work.queue if q.samples > 1}

    def merge(name: str, choices: Sequence[Choice]) -> Record:
        return work.form.answer(several[name], choices, work.settings)

    file = agreed(comm, lambda: AnswerFile(request.out, merge) if comm.rank == 0 else None)
    begin = time.monotonic()
    latest = Progress(0, 0, (0,) * comm.size)

    def note(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        on_progress(progress)

    job = LockstepCallbacks(
        total=len(work.queue),
        start=lambda place: start(place, work.queue[place]),
        length=lambda place: len(work.queue[place].ids),
        at_once=lambda place: max(1, limits.tokens // len(work.queue[place].ids)),
        record=lambda row: _record_or_failure(row, work, choice),
        write=lambda records: file.append(records) if file else None,
        stop=stop_requested,
        tell=note,
        deal=deal,
    )
    complete = run_lockstep(comm, steps, limits.batch, job)
    agreed(comm, lambda: _close(file, complete, work.order), "writing answers")
    counts = (file.answered, file.failed) if file else (0, 0)
    answered, failed = comm.all_gather_object(counts)[0]
    return RunSummary(complete, latest, time.monotonic() - begin, answered, failed)


def finish_only(comm: Communicator, request: RequestBase, work: Workload) -> None:
    """Put a file that has every answer already into the order of the prompts. Collective."""

    def finish() -> None:
        if comm.rank == 0:
            AnswerFile(request.out).finish(work.order)

    agreed(comm, finish, "writing answers")


def _record_or_failure(row: R, work: Workload, choice: Callable[[R], Choice]) -> Record:
    question, why = work.queue[row.place], row.failure
    if why is None:
        try:
            made = choice(row)
            if question.samples > 1:
                return sample_record(question, made, work.settings)
            return work.form.answer(question, [made], work.settings)
        except Exception as error:  # noqa: BLE001 - one row's answer must not end the job
            why = f"its answer cannot be written ({type(error).__name__}: {error})"
    return work.form.failure(question, why, work.settings)


def watch_for_stop() -> Callable[[], bool]:
    """Return a function that says whether SIGTERM has come, which then does nothing else.

    A job that is pre-empted while MPI shuts down has lost nothing, and must not look as if it had.
    """
    is_requested = False

    def on_sigterm(*_: object) -> None:
        nonlocal is_requested
        is_requested = True

    signal.signal(signal.SIGTERM, on_sigterm)
    return lambda: is_requested


def _close(file: AnswerFile | None, complete: bool, order: Mapping[str, int]) -> None:
    if file is None:
        return
    if complete:
        file.finish(order)
    else:
        file.close()
