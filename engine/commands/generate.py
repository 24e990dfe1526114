"""``xpar generate``: answer every prompt of a file with a whole model, its experts spread over the ranks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from xpar.engine.commands import model_session
from xpar.engine.commands.file_command import FileCommand, run_request
from xpar.engine.commands.generation_options import add_generation_options, generation_of
from xpar.engine.commands.options import add_whole_dense, at_least, batch_size, read_bytes
from xpar.engine.generation.generate import generate, settle_room
from xpar.engine.generation.request import Request
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.empty_model import check_generates


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    p.add_argument(
        "checkpoint",
        type=Path,
        help="directory with config.json, safetensors files and tokenizer, or the name of a model on "
        "Hugging Face, such as Qwen/Qwen3-30B-A3B or NAME@REVISION",
    )
    p.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="text file with one prompt per line, or .jsonl with id and prompt",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the answers (default: PROMPTS with the suffix .answers.jsonl)",
    )
    p.add_argument("--resume", action="store_true", help="keep the answers that --out has already")
    add_generation_options(p)
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; repeatable"
    )
    p.add_argument(
        "--stop-token",
        action="append",
        default=[],
        metavar="ID",
        help="token that ends an answer, by id or by name in the vocabulary; repeatable",
    )
    p.add_argument(
        "--keep-special-tokens", action="store_true", help="show special tokens in the answers' texts"
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="put each prompt into the model's chat template, as the user's message",
    )
    model_session.add_options(
        p,
        "sequences",
        "a longer prompt is read in pieces",
        "the answers",
        "as many as memory holds, 256 at most",
    )
    p.add_argument(
        "--kv-memory",
        metavar="BYTES",
        help="memory of a rank for keys and values, such as 4GiB (default: what the prompts can need, and at "
        "most half of the node's free memory)",
    )
    p.add_argument(
        "--no-prefix-sharing",
        action="store_true",
        help="read the beginnings that prompts have in common once for each prompt",
    )
    add_whole_dense(p)
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; return 0, also if a signal ended it with everything written."""
    return run_request(
        args,
        FileCommand(
            make_request, _make_tokenizer, generate, "answering", "prompts answered", settle=settle_room
        ),
    )


def _make_tokenizer(args: argparse.Namespace, request: Request) -> tuple[Tokenizer, Sequence[str]]:
    tokens = Tokenizer(request.checkpoint, request.chat)
    tokens.ids_of(request.stop_tokens)  # raises ValueError for a word that names no token
    return tokens, (*generation_of(args).notes, tokens.ends_note)


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
    generation = generation_of(args)
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
        kv_bytes=None if args.kv_memory is None else read_bytes(args.kv_memory, "--kv-memory"),
        shares_prefixes=not args.no_prefix_sharing,
    )
