"""The work through a file of prompts or texts on all ranks, which answering and scoring share."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.generation.answer_file import AnswerFile
from xpar.engine.generation.answer_form import Choice, Result
from xpar.engine.generation.lockstep import Deal, LockstepCallbacks, Progress, run_lockstep
from xpar.engine.generation.request import RequestBase, Workload
from xpar.engine.generation.samples import sample_result
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
    """The most rows that a rank processes at a time, and the most tokens that it begins in one step."""

    most_rows: int
    tokens: int


class FileRows(Protocol[R]):
    """The rows of a file: how each begins, and what its result says of it once it is complete."""

    def start(self, place: int, item: WorkItem) -> R:
        """Make the row of ``item``, at ``place`` of the queue."""

    def make_choice(self, row: R) -> Choice:
        """Make the content of the result of a complete ``row``."""


def process_file(
    comm: Communicator,
    request: RequestBase,
    work: Workload,
    batch: LocalBatch[R],
    rows: FileRows[R],
    limits: BatchLimits,
    stop_requested: Callable[[], bool],
    on_progress: Callable[[Progress], None],
    deal: Deal | None = None,
) -> RunSummary:
    """Process all of ``work.queue`` with ``batch`` and write the results into ``request.out``. Collective.

    A row that the model could not process, or whose result cannot be made, is written as a failure beside
    ``request.out``; the others go on.

    Args:
        comm: All ranks of the job.
        request: The files and options.
        work: The work items, the same on every rank.
        batch: This rank's batch.
        rows: Makes the rows that ``batch`` begins, and the content of their results.
        limits: How much of the queue a rank may have in its batch.
        stop_requested: Returns whether this rank was asked to stop. If any rank was, all ranks end after the
            current step, with every complete row written.
        on_progress: Is called with the job's progress before each step.
        deal: Deals work items to ranks; by default in the order of the queue.
    """
    with_samples = {item.hash: item for item in work.queue if item.samples > 1}

    def merge(item_hash: str, choices: Sequence[Choice]) -> Result:
        return work.form.answer(with_samples[item_hash], choices, work.settings)

    file = agreed(comm, lambda: AnswerFile(request.out, merge) if comm.rank == 0 else None)
    begin = time.monotonic()
    latest = Progress(0, 0, (0,) * comm.size)

    def report_progress(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        on_progress(progress)

    job = LockstepCallbacks(
        total=len(work.queue),
        start=lambda place: rows.start(place, work.queue[place]),
        length=lambda place: len(work.queue[place].ids),
        at_once=lambda place: max(1, limits.tokens // len(work.queue[place].ids)),
        make_result=lambda row: _make_result(row, work, rows),
        write=lambda results: file.append(results) if file else None,
        stop=stop_requested,
        report_progress=report_progress,
        deal=deal,
    )
    complete = run_lockstep(comm, batch, limits.most_rows, job)
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


def _make_result(row: R, work: Workload, rows: FileRows[R]) -> Result:
    """Make the result of a complete ``row``: a sample, an answer, or why there is none."""
    item, why = work.queue[row.place], row.failure
    if why is None:
        try:
            choice = rows.make_choice(row)
            if item.samples > 1:
                return sample_result(item, choice, work.settings)
            return work.form.answer(item, [choice], work.settings)
        except Exception as error:  # noqa: BLE001 - one row's answer must not end the job
            why = f"its answer cannot be written ({type(error).__name__}: {error})"
    return work.form.failure(item, why, work.settings)


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
