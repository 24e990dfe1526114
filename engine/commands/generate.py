"""``xpar generate``: answer every prompt of a file with a whole model, its experts spread over the ranks."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xpar.comm.failure import agreed
from xpar.engine.commands import model_session
from xpar.engine.commands.generation_options import add_generation_options, generation_of
from xpar.engine.commands.model_session import BATCH, PREFILL_TOKENS
from xpar.engine.commands.options import attach
from xpar.engine.console.logs import start_logging
from xpar.engine.console.terminal import make_console
from xpar.engine.generation.generate import generate
from xpar.engine.generation.request import Request, read_request
from xpar.engine.generation.run_file import finish_only, watch_for_stop
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.kv_cache import check_generates


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    p.add_argument(
        "checkpoint", type=Path, help="directory with config.json, safetensors files and tokenizer"
    )
    p.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one a line; or .jsonl with id and prompt"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="default: PROMPTS with the suffix .answers.jsonl")
    p.add_argument("--resume", action="store_true", help="keep the answers that --out holds already")
    add_generation_options(p)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    p.add_argument(
        "--stop-token",
        action="append",
        default=[],
        metavar="ID",
        help="ends an answer: a token's id or its name in the vocabulary; repeatable",
    )
    p.add_argument("--keep-special-tokens", action="store_true", help="show special tokens in the texts")
    p.add_argument(
        "--chat", action="store_true", help="put each prompt into the chat template, as the user's"
    )
    p.add_argument(
        "--batch", type=int, help=f"sequences a rank runs at a time (default {BATCH}; 1 with --exact)"
    )
    p.add_argument(
        "--prefill-tokens",
        type=int,
        default=PREFILL_TOKENS,
        help=f"of prompts that a rank reads in one step (default {PREFILL_TOKENS}; a longer prompt goes alone)",
    )
    p.add_argument("--exact", action="store_true", help="text that does not depend on the number of ranks")
    model_session.add_grid_options(p)
    model_session.add_whole_dense(p)
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; 0 also if a signal ended it with everything written."""
    # From the first moment: a job that is pre-empted while it loads has lost nothing either.
    return _run(args, watch_for_stop())


def _run(args: argparse.Namespace, told: Callable[[], bool]) -> int:
    world = attach(args)
    start_logging(world, args.verbose)
    request = agreed(world.comm, lambda: _request(args, world.rank == 0))
    notes = agreed(world.comm, lambda: generation_of(args).notes)
    console = make_console(world)
    grid = model_session.make_grid(args, world, console)
    request = replace(request, exact_with=model_session.exact_with(args, grid))
    tokens = agreed(world.comm, lambda: Tokenizer(request.checkpoint, request.chat))
    agreed(world.comm, lambda: tokens.ids_of(request.stop_tokens))
    for note in (*notes, tokens.ends_note):
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    work = read_request(world.comm, request, tokens, args.resume)
    done = "prompts answered"
    if not work.queue:
        finish_only(world.comm, request, work)
        console.print(model_session.counts(request, work, 0, 0, done), soft_wrap=True)
        model_session.check_any_answered(world.comm, request, work, 0)
        return 0
    loaded = model_session.load(args, grid, request.dtype, console, args.whole_dense)
    with model_session.meter(world, "answering", work) as tell:
        outcome = generate(world.comm, request, work, tokens, loaded, told, tell)
    console.print(model_session.counts(request, work, outcome.answers, outcome.failed, done), soft_wrap=True)
    if outcome.tokens:
        console.print(model_session.speed(outcome), soft_wrap=True)
    console.print(model_session.memory(world.comm), soft_wrap=True)
    model_session.check_any_answered(world.comm, request, work, outcome.failed)
    return 0


def _request(args: argparse.Namespace, first: bool) -> Request:
    """Everything that can be wrong with the words before any rank loads or writes anything.

    ``first``: whether this is the rank that reads prompts and writes answers; the others need not see those files.
    """
    model_session.check_at_least_one(args, "max-new-tokens", "batch", "prefill-tokens", "threads")
    batch = model_session.batch_of(args)
    if "" in args.stop:
        raise ValueError("--stop '': an empty text would end every answer; give at least one character")
    generation = generation_of(args)
    out = args.out or args.prompts.with_suffix(".answers.jsonl")
    check_generates(args.checkpoint)
    if first:
        model_session.check_files(args.prompts, out, args.resume, "--prompts")
    return Request(
        checkpoint=args.checkpoint,
        prompts=args.prompts,
        out=out,
        sampling=generation.sampling,
        max_new_tokens=generation.max_new_tokens,
        stops=generation.stops,
        stop_tokens=tuple(args.stop_token),
        keep_special=args.keep_special_tokens,
        chat=args.chat,
        batch=batch,
        prefill_tokens=args.prefill_tokens,
        dtype=model_session.dtype_of(args),
        exact=args.exact,
    )
