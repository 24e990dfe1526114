"""``xpar score``: log-probabilities of texts by a whole model, its experts spread over the ranks."""

import argparse
from collections.abc import Sequence

from xpar.comm.communicator import Communicator
from xpar.engine.commands import model_session
from xpar.engine.commands.file_command import FileCommand, OnProgress, StopRequested, run_request
from xpar.engine.commands.options import at_least, batch_size
from xpar.engine.generation.request import ScoreRequest, Workload
from xpar.engine.generation.run_file import RunSummary
from xpar.engine.generation.score import read_total, score
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loaded_model import LoadedModel


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; return 0, also if a signal ended it with everything written."""
    return run_request(
        args, FileCommand(make_request, _make_tokenizer, _process, "scoring", "texts scored", _total)
    )


def _process(
    comm: Communicator,
    request: ScoreRequest,
    work: Workload,
    _: Tokenizer,
    loaded: LoadedModel,
    stop_requested: StopRequested,
    on_progress: OnProgress,
) -> RunSummary:
    return score(comm, request, work, loaded, stop_requested, on_progress)


def _make_tokenizer(args: argparse.Namespace, request: ScoreRequest) -> tuple[Tokenizer, Sequence[str]]:
    return Tokenizer(request.checkpoint), ()


def make_request(args: argparse.Namespace, is_first: bool) -> ScoreRequest:
    """Make the request of the options, or raise ValueError, before any rank loads or writes.

    ``is_first``: whether this rank reads texts and writes scores; the others need not see those files.
    """
    at_least(batch=(args.batch, 1), prefill_tokens=(args.prefill_tokens, 1), threads=(args.threads, 1))
    batch = batch_size(args)
    out = args.out or args.texts.with_suffix(".scores.jsonl")
    if is_first:
        model_session.check_files(args.texts, out, args.resume, "--texts")
    return ScoreRequest(
        checkpoint=args.checkpoint,
        prompts=args.texts,
        out=out,
        batch=batch,
        prefill_tokens=args.prefill_tokens,
        dtype=model_session.dtype_of(args),
        exact=args.exact,
    )


def _total(comm: Communicator, request: ScoreRequest) -> str:
    """Describe the scores of the whole file, those of earlier runs among them; collective."""
    total = read_total(comm, request.out)
    if total.perplexity is None:
        return f"all scores of the file: {total.tokens} tokens, log-probability {total.logprob:.1f}"
    return f"all scores of the file: {total.tokens} tokens, perplexity {total.perplexity:.4f}"
