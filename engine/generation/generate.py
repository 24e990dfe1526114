"""Answering a file of prompts on all ranks."""

from collections.abc import Callable
from dataclasses import replace

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.generation.answer_form import Choice
from xpar.engine.generation.answer_options import AnswerOptions
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.detokenizer import Stops
from xpar.engine.generation.flat_batch import FlatBatch
from xpar.engine.generation.kv_memory import (
    BATCH,
    FLAT_BATCH,
    GPU_BATCH,
    READ_TOKENS,
    BatchRoom,
    choose_blocks,
    choose_read_tokens,
    choose_rows,
    expected_bytes,
    free_share,
    most_read,
    step_bytes,
)
from xpar.engine.generation.line_processors import make_line_processors
from xpar.engine.generation.lockstep import Progress
from xpar.engine.generation.request import Request, Workload
from xpar.engine.generation.run_file import BatchLimits, RunSummary, process_file
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.token_logprobs import TokenLogprobs
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.generation.work_item import WorkItem
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.kv_pool import BLOCK_TOKENS
from xpar.engine.models.loaded_model import LoadedModel


def generate(
    comm: Communicator,
    request: Request,
    work: Workload,
    tokenizer: Tokenizer,
    loaded: LoadedModel,
    stop_requested: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> RunSummary:
    """Answer the prompts of ``work.queue`` into ``request.out``, as :func:`process_file` says. Collective."""
    rows = AnswerRows(request, work, tokenizer)
    stop_conditions = StopConditions(request.max_new_tokens, tokenizer.ends)
    batch = choose_batch(loaded, request.sampling, stop_conditions, room=room_of(request, work))
    deal = None
    if isinstance(batch, FlatBatch):
        drawn = [_most_new_tokens(request, item) for item in work.queue]
        deal = batch.dealer([item.ids for item in work.queue], comm.size, drawn)
    return process_file(
        comm,
        request,
        work,
        batch,
        rows,
        BatchLimits(request.batch or BATCH, request.prefill_tokens or READ_TOKENS),
        stop_requested,
        on_progress,
        deal,
    )


def settle_room(
    comm: Communicator, request: Request, work: Workload, loaded: LoadedModel
) -> tuple[Request, str]:
    """Choose what ``request`` leaves open of batch and memory; return it, and a line that says so.

    Collective. Raises AgreedError for a memory that cannot be.
    """
    read_tokens = request.prefill_tokens or choose_read_tokens(comm, loaded)
    return agreed(comm, lambda: _settle(request, work, loaded, read_tokens))


def _settle(request: Request, work: Workload, loaded: LoadedModel, read_tokens: int) -> tuple[Request, str]:
    forms = flat_forms(loaded)
    if isinstance(forms, str):
        batch = request.batch or BATCH
        line = f"batches of {batch} padded sequences a rank: {forms}"
        return replace(request, batch=batch, prefill_tokens=read_tokens), line
    on_host = loaded.device.type == "cpu"
    rows = request.batch or (FLAT_BATCH if on_host else GPU_BATCH)
    room = room_of(replace(request, batch=rows, prefill_tokens=read_tokens), work)
    blocks = choose_blocks(forms, room, free_share(loaded))
    if request.batch is None and not on_host:
        rows = choose_rows(rows, blocks, room.lengths or ())
    tokens = blocks * BLOCK_TOKENS
    nbytes = tokens * sum(form.nbytes for form in forms)
    line = (
        f"keys and values of up to {tokens} tokens a rank, {nbytes / 1e6:.1f} MB, in blocks of "
        f"{BLOCK_TOKENS}; up to {rows} sequences at a time, and {read_tokens} tokens of prompts in a step"
    )
    if on_host:
        longest = sorted((len(item.ids) for item in work.queue), reverse=True)[:rows]
        read = most_read(longest, read_tokens) + min(rows, len(longest))
        whole = expected_bytes(nbytes + step_bytes(loaded, read))
        line += f"; at most about {whole / 1e6:.0f} MB of memory on rank 0"
    return replace(request, batch=rows, prefill_tokens=read_tokens, kv_bytes=nbytes), line


def room_of(request: Request, work: Workload) -> BatchRoom:
    """Return the room of a rank's batch."""
    return BatchRoom(
        request.batch or BATCH,
        request.prefill_tokens or READ_TOKENS,
        request.kv_bytes,
        [len(item.ids) + _most_new_tokens(request, item) for item in work.queue],
        request.shares_prefixes,
    )


def _most_new_tokens(request: Request, item: WorkItem) -> int:
    options = item.options
    return request.max_new_tokens if options is None else options.max_new_tokens


class AnswerRows:
    """The sequences of a file's prompts: how each begins, and the text and facts of its complete answer."""

    def __init__(self, request: Request, work: Workload, tokenizer: Tokenizer) -> None:
        self._work, self._tokenizer, self._keep_special = work, tokenizer, request.keep_special
        self._usual = AnswerOptions(request.sampling, request.max_new_tokens, request.stops)
        self._stop_ids = tokenizer.ids_of(request.stop_tokens)
        self._detokenizer = tokenizer.detokenizer()
        self._logprobs = tokenizer.logprobs_form(request.keep_special)

    def start(self, place: int, item: WorkItem) -> RunningSequence:
        """Make the sequence of ``item``, at ``place`` of the queue."""
        options, tokenizer = item.options or self._usual, self._tokenizer
        grammars = None if options.schema is None else tokenizer.grammars
        row = RunningSequence(place, item.ids, options.sampling.generator(item.seed_text))
        row.processors = make_line_processors(options, item.ids, tokenizer.ends, grammars)
        row.stopped = self._detokenizer.stop_test(item.ids, self._stops(item))
        if item.options is not None:
            # Equal ways to draw share a decision; the seed is in the generator.
            row.sampling, row.max_new_tokens = replace(options.sampling, seed=0), options.max_new_tokens
            row.ends = frozenset() if options.ignores_ends else None
            row.logprobs = None if options.logprobs is None else TokenLogprobs(options.logprobs)
        return row

    def make_choice(self, row: RunningSequence) -> Choice:
        """Make text, finish and token ids of the answer of a complete ``row``."""
        item = self._work.queue[row.place]
        stops, answer = self._stops(item), row.answer
        text = self._detokenizer.cut(item.ids, answer, stops, self._keep_special)
        made = {"text": text, "tokens": len(answer), "finish": row.finish, "token_ids": answer}
        if row.logprobs is not None:
            form = self._logprobs
            shown = answer[: form.shown(answer, text)] if row.finish == "stop" else answer
            is_chat = item.prompt.messages is not None
            made["logprobs"] = (form.chat if is_chat else form.completion)(shown, row.logprobs)
        return made

    def _stops(self, item: WorkItem) -> Stops:
        return Stops((item.options or self._usual).stops, self._stop_ids)
