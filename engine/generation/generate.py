"""Answering a file of prompts on all ranks."""

from collections.abc import Callable, Sequence

from xpar.comm.communicator import Communicator
from xpar.engine.generation.decode_batch import DecodeBatch, RunningSequence
from xpar.engine.generation.decode_batch import StopConditions as Ends
from xpar.engine.generation.lockstep import Progress, Record
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.request import Request, WorkItem, Workload
from xpar.engine.generation.run_file import BatchLimits, RunSummary, first_line, last_line, process_file
from xpar.engine.generation.tokenizer import Tokenizer, first_stop
from xpar.engine.models.loader import LoadedModel

TOKENS_PER_CHARACTER = 4
"""At most: a tokenizer of bytes may need one for each byte of a character."""


def generate(
    comm: Communicator,
    request: Request,
    work: Workload,
    tokens: Tokenizer,
    loaded: LoadedModel,
    told: Callable[[], bool] = lambda: False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> RunSummary:
    """Answer ``work.queue`` into ``request.out``; collective. ``told`` and ``tell``: see :func:`process_file`."""
    stopped = stop_test(request.stops, tokens)
    ends = Ends(request.max_new_tokens, tokens.ends, stopped)

    def start(place: int, question: WorkItem) -> RunningSequence:
        return RunningSequence(place, question.ids, request.sampling.generator(question.hash))

    return process_file(
        comm,
        request,
        work,
        DecodeBatch(loaded, request.sampling, ends, DecodeGraph.of(loaded)),
        BatchLimits(request.batch, request.prefill_tokens),
        start,
        lambda r: _record(work, work.queue[r.place], r, tokens, request.stops),
        told,
        tell,
    )


def stop_test(stops: tuple[str, ...], tokens: Tokenizer) -> Callable[[Sequence[int]], bool]:
    """Whether an answer's tokens have just completed one of ``stops``."""
    tail = TOKENS_PER_CHARACTER * (max(map(len, stops), default=0) + 1)

    def stopped(ids: Sequence[int]) -> bool:
        # The end alone is decoded first: the whole answer at every token would cost its length squared.
        if not stops or first_stop(tokens.decode(ids[-tail:]), stops) is None:
            return False
        return first_stop(tokens.decode(ids), stops) is not None

    return stopped


def _record(
    work: Workload, question: WorkItem, running: RunningSequence, tokens: Tokenizer, stops: tuple[str, ...]
) -> Record:
    text = tokens.decode(running.answer)
    return {
        **first_line(question),
        "text": text[: first_stop(text, stops)],
        "tokens": len(running.answer),
        "finish": running.finish,
        **last_line(question, work),
    }
