"""Answering a file of prompts on all ranks."""

from collections.abc import Callable, Sequence

from xpar.comm.communicator import Communicator
from xpar.engine.generation.decode_batch import Limits as Ends
from xpar.engine.generation.decode_batch import Running, Sequences
from xpar.engine.generation.lockstep import Progress, Record
from xpar.engine.generation.recorder import Recorder
from xpar.engine.generation.request import Question, Request, Work
from xpar.engine.generation.run_file import Limits, Outcome, head_of, tail_of, work_through
from xpar.engine.generation.tokenizer import Tokens, first_stop
from xpar.engine.models.loader import LoadedModel

TOKENS_PER_CHARACTER = 4
"""At most: a tokenizer of bytes may need one for each byte of a character."""


def generate(
    comm: Communicator,
    request: Request,
    work: Work,
    tokens: Tokens,
    loaded: LoadedModel,
    told: Callable[[], bool] = lambda: False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Answer ``work.queue`` into ``request.out``; collective. ``told`` and ``tell``: see :func:`work_through`."""
    stopped = stop_test(request.stops, tokens)
    ends = Ends(request.max_new_tokens, tokens.ends, stopped)

    def start(place: int, question: Question) -> Running:
        return Running(place, question.ids, request.sampling.generator(question.hash))

    return work_through(
        comm,
        request,
        work,
        Sequences(loaded, request.sampling, ends, Recorder.of(loaded)),
        Limits(request.batch, request.prefill_tokens),
        start,
        lambda r: _record(work, work.queue[r.place], r, tokens, request.stops),
        told,
        tell,
    )


def stop_test(stops: tuple[str, ...], tokens: Tokens) -> Callable[[Sequence[int]], bool]:
    """Whether an answer's tokens have just completed one of ``stops``."""
    tail = TOKENS_PER_CHARACTER * (max(map(len, stops), default=0) + 1)

    def stopped(ids: Sequence[int]) -> bool:
        # The end alone is decoded first: the whole answer at every token would cost its length squared.
        if not stops or first_stop(tokens.decode(ids[-tail:]), stops) is None:
            return False
        return first_stop(tokens.decode(ids), stops) is not None

    return stopped


def _record(
    work: Work, question: Question, running: Running, tokens: Tokens, stops: tuple[str, ...]
) -> Record:
    text = tokens.decode(running.answer)
    return {
        **head_of(question),
        "text": text[: first_stop(text, stops)],
        "tokens": len(running.answer),
        "finish": running.finish,
        **tail_of(question, work),
    }
