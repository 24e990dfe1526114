"""``xpar generate``: answer every prompt of a file with a whole model, its experts spread over the ranks."""

import argparse
from collections.abc import Sequence

from xpar.engine.commands import model_session
from xpar.engine.commands.file_command import FileCommand, run_request
from xpar.engine.commands.generation_options import generation_of, run_options
from xpar.engine.commands.options import at_least, batch_size, read_bytes
from xpar.engine.generation.generate import generate, settle_room
from xpar.engine.generation.request import Request
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.empty_model import check_generates


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; return 0, also if a signal ended it with everything written."""
    return run_request(
        args,
        FileCommand(
            make_request, _make_tokenizer, generate, "answering", "prompts answered", settle=settle_room
        ),
    )


def _make_tokenizer(args: argparse.Namespace, request: Request) -> tuple[Tokenizer, Sequence[str]]:
    tokenizer = Tokenizer(request.checkpoint, request.chat)
    tokenizer.ids_of(request.stop_tokens)  # raises ValueError for a word that names no token
    return tokenizer, (*generation_of(run_options(args)).notes, tokenizer.ends_note)


def make_request(args: argparse.Namespace, is_first: bool) -> Request:
    """Make the request of the options, or raise ValueError, before any rank loads or writes.

    ``is_first``: whether this rank reads prompts and writes answers; the others need not see those files.
    """
    at_least(
        max_new_tokens=(args.max_new_tokens, 1),
        batch=(args.batch, 1),
        prefill_tokens=(args.prefill_tokens, 1),
        threads=(args.threads, 1),
    )
    batch = batch_size(args) if args.exact else args.batch  # None: chosen once the model is loaded
    if "" in args.stop:
        raise ValueError("--stop '': an empty text would end every answer; give at least one character")
    options = run_options(args)
    generation = generation_of(options)
    out = args.out or args.prompts.with_suffix(".answers.jsonl")
    check_generates(args.checkpoint)
    if is_first:
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
        options=options,
        format=args.format,
        model=getattr(args, "model_name", str(args.checkpoint)),
        kv_bytes=None if args.kv_memory is None else read_bytes(args.kv_memory, "--kv-memory"),
        shares_prefixes=not args.no_prefix_sharing,
    )
