"""Answering a file of prompts on all ranks."""

from collections.abc import Callable
from dataclasses import replace

from xpar.comm.communicator import Communicator
from xpar.engine.generation.decode_batch import RunningSequence
from xpar.engine.generation.decode_batch import StopConditions as Ends
from xpar.engine.generation.detokenizer import Detokenizer, Stops
from xpar.engine.generation.flat_batch import FlatBatch
from xpar.engine.generation.grouped_batch import make_batch
from xpar.engine.generation.kv_memory import BATCH, FLAT_BATCH, BatchRoom, choose_blocks
from xpar.engine.generation.lockstep import Progress, Record
from xpar.engine.generation.logits_processors import make_processors
from xpar.engine.generation.request import Request, WorkItem, Workload
from xpar.engine.generation.run_file import BatchLimits, RunSummary, first_line, last_line, process_file
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.kv_pool import BLOCK_TOKENS
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

    batch = make_batch(loaded, sampling, Ends(most, tokens.ends), room=room_of(request, work))
    prompts = [question.ids for question in work.queue]
    deal = batch.dealer(prompts, comm.size, most) if isinstance(batch, FlatBatch) else None

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
        batch,
        BatchLimits(request.batch or BATCH, request.prefill_tokens),
        start,
        lambda r: _record(work, r, detokenizer, stops, request.keep_special),
        stop_requested,
        on_progress,
        deal,
    )


def settle_room(request: Request, work: Workload, loaded: LoadedModel) -> tuple[Request, str]:
    """Choose what ``request`` leaves open of batch and memory; return it, and a line that says so.

    Collective. Raises ValueError for a memory that cannot be.
    """
    forms = flat_forms(loaded)
    if isinstance(forms, str):
        batch = request.batch or BATCH
        return replace(request, batch=batch), f"batches of {batch} padded sequences a rank: {forms}"
    request = replace(request, batch=request.batch or FLAT_BATCH)
    tokens = choose_blocks(forms, room_of(request, work), loaded.ranks_of_node) * BLOCK_TOKENS
    nbytes = tokens * sum(form.nbytes for form in forms)
    line = (
        f"keys and values of up to {tokens} tokens a rank, {nbytes / 1e6:.1f} MB, in blocks of "
        f"{BLOCK_TOKENS}; up to {request.batch} sequences at a time"
    )
    return replace(request, kv_bytes=nbytes), line


def room_of(request: Request, work: Workload) -> BatchRoom:
    """Return the room of a rank's batch."""
    return BatchRoom(
        request.batch or BATCH,
        request.prefill_tokens,
        request.kv_bytes,
        [len(question.ids) + request.max_new_tokens for question in work.queue],
        request.shares_prefixes,
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
