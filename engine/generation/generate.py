"""Answering a file of prompts on all ranks."""

from collections.abc import Callable
from dataclasses import replace

from xpar.comm.communicator import Communicator
from xpar.engine.generation.answer_options import AnswerOptions
from xpar.engine.generation.decode_batch import RunningSequence
from xpar.engine.generation.decode_batch import StopConditions as Ends
from xpar.engine.generation.detokenizer import Detokenizer, Stops
from xpar.engine.generation.grouped_batch import make_batch
from xpar.engine.generation.lockstep import Progress, Record
from xpar.engine.generation.logits_processors import make_processors
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
    stop_ids = tokens.ids_of(request.stop_tokens)
    detokenizer = tokens.detokenizer()
    usual = AnswerOptions(request.sampling, request.max_new_tokens, request.stops)

    def start(place: int, question: WorkItem) -> RunningSequence:
        ids, options = question.ids, question.options or usual
        sampling, most = options.sampling, options.max_new_tokens
        row = RunningSequence(place, ids, sampling.generator(question.draws or question.hash))
        row.processors = make_processors(dict(sampling.settings), ids, most, tokens.ends)
        row.stopped = detokenizer.stop_test(ids, Stops(options.stops, stop_ids))
        if question.options is not None:
            # Equal ways to draw share a decision; the seed is in the generator.
            row.sampling, row.max_new_tokens = replace(sampling, seed=0), most
        return row

    return process_file(
        comm,
        request,
        work,
        make_batch(loaded, usual.sampling, Ends(usual.max_new_tokens, tokens.ends)),
        BatchLimits(request.batch, request.prefill_tokens),
        start,
        lambda r: _record(work, r, detokenizer, usual, stop_ids, request.keep_special),
        stop_requested,
        on_progress,
    )


def _record(
    work: Workload,
    running: RunningSequence,
    detokenizer: Detokenizer,
    usual: AnswerOptions,
    stop_ids: frozenset[int],
    keep_special: bool,
) -> Record:
    question = work.queue[running.place]
    stops = Stops((question.options or usual).stops, stop_ids)
    return {
        **first_line(question),
        "text": detokenizer.cut(question.ids, running.answer, stops, keep_special),
        "tokens": len(running.answer),
        "finish": running.finish,
        "token_ids": running.answer,
        **last_line(question, work),
    }
