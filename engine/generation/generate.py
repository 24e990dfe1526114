"""Answering a file of prompts on all ranks."""

from collections.abc import Callable

from xpar.comm.communicator import Communicator
from xpar.engine.generation.decode_batch import DecodeBatch, RunningSequence
from xpar.engine.generation.decode_batch import StopConditions as Ends
from xpar.engine.generation.detokenizer import Detokenizer, Stops
from xpar.engine.generation.lockstep import Progress, Record
from xpar.engine.generation.logits_processors import make_processors
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.request import Request, WorkItem, Workload
from xpar.engine.generation.run_file import BatchLimits, RunSummary, first_line, last_line, process_file
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import LoadedModel


def generate(
    comm: Communicator,
    request: Request,
    work: Workload,
    tokens: Tokenizer,
    loaded: LoadedModel,
    stop_requested: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> RunSummary:
    """Answer the prompts of ``work.queue`` into ``request.out``, as :func:`process_file` says. Collective."""
    stops = Stops(request.stops, tokens.ids_of(request.stop_tokens))
    detokenizer = tokens.detokenizer()
    sampling, most = request.sampling, request.max_new_tokens

    def start(place: int, question: WorkItem) -> RunningSequence:
        ids = question.ids
        processors = make_processors(dict(sampling.settings), ids, most, tokens.ends)
        stopped = detokenizer.stop_test(ids, stops)
        generator = sampling.generator(question.hash)
        return RunningSequence(place, ids, generator, processors=processors, stopped=stopped)

    return process_file(
        comm,
        request,
        work,
        DecodeBatch(loaded, sampling, Ends(most, tokens.ends), DecodeGraph.of(loaded)),
        BatchLimits(request.batch, request.prefill_tokens),
        start,
        lambda r: _record(work, r, detokenizer, stops, request.keep_special),
        stop_requested,
        on_progress,
    )


def _record(
    work: Workload, running: RunningSequence, detokenizer: Detokenizer, stops: Stops, keep_special: bool
) -> Record:
    question = work.queue[running.place]
    return {
        **first_line(question),
        "text": detokenizer.cut(question.ids, running.answer, stops, keep_special),
        "tokens": len(running.answer),
        "finish": running.finish,
        "token_ids": running.answer,
        **last_line(question, work),
    }
