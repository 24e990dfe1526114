"""``xpar score``: log-probabilities of texts by a whole model, its experts spread over the ranks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from xpar.comm.communicator import Communicator
from xpar.engine.commands import model_session
from xpar.engine.commands.file_command import FileCommand, OnProgress, StopRequested, run_request
from xpar.engine.commands.model_session import BATCH, PREFILL_TOKENS
from xpar.engine.generation.request import ScoreRequest, Workload
from xpar.engine.generation.run_file import RunSummary
from xpar.engine.generation.score import read_total, score
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import LoadedModel


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    p.add_argument(
        "checkpoint", type=Path, help="directory with config.json, safetensors files and tokenizer"
    )
    p.add_argument(
        "--texts",
        type=Path,
        required=True,
        metavar="FILE",
        help="text file with one text per line, or .jsonl with id and text, "
        "or with id, context and continuation",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the scores (default: TEXTS with the suffix .scores.jsonl)",
    )
    p.add_argument("--resume", action="store_true", help="keep the scores that --out has already")
    p.add_argument(
        "--batch",
        type=int,
        help=f"number of texts that a rank reads at a time (default {BATCH}; 1 with --exact)",
    )
    p.add_argument(
        "--prefill-tokens",
        type=int,
        default=PREFILL_TOKENS,
        help="maximum number of tokens that a rank reads in one step; a longer text is read alone, in pieces "
        f"(default {PREFILL_TOKENS})",
    )
    p.add_argument("--exact", action="store_true", help="make the scores independent of the number of ranks")
    model_session.add_grid_options(p)
    p.set_defaults(main=main)


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
    """Make the request of the options, or raise ValueError, before any rank loads or writes anything.

    ``is_first``: whether this rank reads texts and writes scores; the others need not see those files.
    """
    model_session.check_at_least_one(args, "batch", "prefill-tokens", "threads")
    batch = model_session.batch_of(args)
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
