"""Answering a file of prompts on all ranks, into a file that loses nothing."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.models.load import LoadedModel
from xpar.engine.models.lockstep import Job, Progress, Record, answer
from xpar.engine.models.request import Question, Request, Work
from xpar.engine.models.results import AnswerFile
from xpar.engine.models.sequences import Limits, Running, Sequences
from xpar.engine.models.tokens import Tokens, first_stop

TOKENS_PER_CHARACTER = 4
"""At most: a tokenizer of bytes may need one for each byte of a character."""


@dataclass(frozen=True)
class Outcome:
    """``complete``: False if a signal ended it early. ``progress``: of this run, at its end."""

    complete: bool
    progress: Progress
    seconds: float

    @property
    def answers(self) -> int:
        return self.progress.done

    @property
    def tokens(self) -> int:
        return self.progress.tokens


def generate(
    comm: Communicator,
    request: Request,
    work: Work,
    tokens: Tokens,
    loaded: LoadedModel,
    told: Callable[[], bool] = lambda: False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Answer ``work.queue`` into ``request.out``; collective.

    ``told``: whether this rank was told to stop; if any was, all end after the step they are in, with everything
    written that was complete. ``tell`` hears where the job is before each step.
    """
    stopped = _stop_test(request.stops, tokens)
    sequences = Sequences(loaded, request.sampling, Limits(request.max_new_tokens, tokens.ends, stopped))
    file = agreed(comm, lambda: AnswerFile(request.out) if comm.rank == 0 else None)
    begin = time.monotonic()
    latest = Progress(0, 0, (0,) * comm.size)

    def note(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        tell(progress)

    def start(place: int) -> Running:
        question = work.queue[place]
        return Running(place, question.ids, request.sampling.generator(question.hash))

    job = Job(
        total=len(work.queue),
        start=start,
        at_once=lambda place: max(1, request.prefill_tokens // len(work.queue[place].ids)),
        record=lambda r: _record(work.queue[r.place], r, tokens, request.stops, work.settings),
        write=lambda records: file.append(records) if file else None,
        stop=told,
        tell=note,
    )
    complete = answer(comm, sequences, request.batch, job)
    agreed(comm, lambda: _close(file, complete, work.order), "writing answers")
    return Outcome(complete, latest, time.monotonic() - begin)


def finish_only(comm: Communicator, request: Request, work: Work) -> None:
    """Put a file that has every answer already into the order of the prompts; collective."""

    def finish() -> None:
        if comm.rank == 0:
            AnswerFile(request.out).finish(work.order)

    agreed(comm, finish, "writing answers")


def _close(file: AnswerFile | None, complete: bool, order: Mapping[str, int]) -> None:
    if file is None:
        return
    if complete:
        file.finish(order)
    else:
        file.close()


def listen_for_stop() -> Callable[[], bool]:
    """Whether this process has been sent SIGTERM, which from now on does nothing else.

    To its very end: a job that is pre-empted while MPI shuts down has lost nothing, and must not look as if it had.
    """
    told = False

    def remember(*_: object) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, remember)
    return lambda: told


def _stop_test(stops: tuple[str, ...], tokens: Tokens) -> Callable[[Sequence[int]], bool]:
    """Whether an answer's tokens have just completed one of ``stops``."""
    tail = TOKENS_PER_CHARACTER * (max(map(len, stops), default=0) + 1)

    def stopped(ids: Sequence[int]) -> bool:
        # The end alone is decoded first: the whole answer at every token would cost its length squared.
        if not stops or first_stop(tokens.decode(ids[-tail:]), stops) is None:
            return False
        return first_stop(tokens.decode(ids), stops) is not None

    return stopped


def _record(
    question: Question, running: Running, tokens: Tokens, stops: tuple[str, ...], settings: str
) -> Record:
    text = tokens.decode(running.answer)
    return {
        "line": question.prompt.line,
        **({} if question.prompt.id is None else {"id": question.prompt.id}),
        "text": text[: first_stop(text, stops)],
        "tokens": len(running.answer),
        "finish": running.finish,
        "hash": question.hash,
        "settings": settings,
    }
