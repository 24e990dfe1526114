"""``xpar score``: how likely a whole model finds the texts of a file, its experts spread over the ranks."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.commands import model_session
from xpar.engine.commands.model_session import BATCH, PREFILL_TOKENS
from xpar.engine.commands.options import attach
from xpar.engine.console.logs import start_logging
from xpar.engine.console.terminal import make_console
from xpar.engine.generation.request import ScoreRequest, read_request
from xpar.engine.generation.run_file import finish_only, watch_for_stop
from xpar.engine.generation.score import read_total, score
from xpar.engine.generation.tokenizer import Tokenizer


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
        help="one a line; or .jsonl with id and text, or id, context and continuation",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="default: TEXTS with the suffix .scores.jsonl")
    p.add_argument("--resume", action="store_true", help="keep the scores that --out holds already")
    p.add_argument(
        "--batch", type=int, help=f"texts a rank reads at a time (default {BATCH}; 1 with --exact)"
    )
    p.add_argument(
        "--prefill-tokens",
        type=int,
        default=PREFILL_TOKENS,
        help=f"that a rank reads in one step (default {PREFILL_TOKENS}; a longer text goes alone, in pieces)",
    )
    p.add_argument("--exact", action="store_true", help="numbers that do not depend on the number of ranks")
    model_session.add_grid_options(p)
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; 0 also if a signal ended it with everything written."""
    # From the first moment: a job that is pre-empted while it loads has lost nothing either.
    return _run(args, watch_for_stop())


def _run(args: argparse.Namespace, told: Callable[[], bool]) -> int:
    world = attach(args)
    start_logging(world, args.verbose)
    request = agreed(world.comm, lambda: _request(args, world.rank == 0))
    console = make_console(world)
    grid = model_session.make_grid(args, world, console)
    request = replace(request, exact_with=model_session.exact_with(args, grid))
    tokens = agreed(world.comm, lambda: Tokenizer(request.checkpoint))
    work = read_request(world.comm, request, tokens, args.resume)
    done = "texts scored"
    if not work.queue:
        finish_only(world.comm, request, work)
        console.print(model_session.counts(request, work, 0, 0, done), soft_wrap=True)
        model_session.check_any_answered(world.comm, request, work, 0)
        console.print(_total(world.comm, request), soft_wrap=True)
        return 0
    loaded = model_session.load(args, grid, request.dtype, console)
    with model_session.meter(world, "scoring", work) as tell:
        outcome = score(world.comm, request, work, loaded, told, tell)
    console.print(model_session.counts(request, work, outcome.answers, outcome.failed, done), soft_wrap=True)
    console.print(_total(world.comm, request), soft_wrap=True)
    console.print(model_session.speed(outcome), soft_wrap=True)
    console.print(model_session.memory(world.comm), soft_wrap=True)
    model_session.check_any_answered(world.comm, request, work, outcome.failed)
    return 0


def _request(args: argparse.Namespace, first: bool) -> ScoreRequest:
    """Everything that can be wrong with the words before any rank loads or writes anything.

    ``first``: whether this is the rank that reads texts and writes scores; the others need not see those files.
    """
    model_session.check_at_least_one(args, "batch", "prefill-tokens", "threads")
    batch = model_session.batch_of(args)
    out = args.out or args.texts.with_suffix(".scores.jsonl")
    if first:
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
    total = read_total(comm, request.out)
    if total.perplexity is None:
        return f"all scores of the file: {total.tokens} tokens, log-probability {total.logprob:.1f}"
    return f"all scores of the file: {total.tokens} tokens, perplexity {total.perplexity:.4f}"
