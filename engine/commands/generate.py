"""``xpar generate``: answer every prompt of a file with a whole model, its experts spread over the ranks."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.build import FLOATS
from xpar.engine.checkpoint import Checkpoint
from xpar.engine.commands.run import pick_device, where
from xpar.engine.logs import add_verbose, start_logging
from xpar.engine.models.generate import Outcome, finish_only, generate, listen_for_stop
from xpar.engine.models.load import LoadedModel, load_model
from xpar.engine.models.lockstep import Progress
from xpar.engine.models.request import Request, Work, prepare
from xpar.engine.models.results import errors_path
from xpar.engine.models.sampling import Sampling
from xpar.engine.models.spread import ExpertOptions
from xpar.engine.models.tokens import Tokens
from xpar.engine.terminal import Meter, make_console
from xpar.engine.watching import add_watching, attach

BATCH = 16
PREFILL_TOKENS = 4096


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    p = subparsers.add_parser("generate", help="answer every prompt of a file with a whole model")
    p.add_argument(
        "checkpoint", type=Path, help="directory with config.json, safetensors files and tokenizer"
    )
    p.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one a line; or .jsonl with id and prompt"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="default: PROMPTS with the suffix .answers.jsonl")
    p.add_argument("--resume", action="store_true", help="keep the answers that --out holds already")
    p.add_argument("--max-new-tokens", type=int, default=128, help="of an answer (default 128)")
    p.add_argument("--temperature", type=float, default=0.0, help="default 0: the likeliest token, no draw")
    p.add_argument("--top-k", type=int, default=0, help="draw among this many (default: all)")
    p.add_argument("--top-p", type=float, default=1.0, help="draw among those that make up this probability")
    p.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
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
    for axis, what in (("ep", "expert"), ("etp", "expert tensor")):
        p.add_argument(f"--{axis}", type=int, help=f"{what}-parallel ranks")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as for xpar run")
    p.add_argument("--transport", default="auto", help="between GPUs: auto, nccl, staged or mpi")
    p.add_argument("--dispatcher", default="auto", help="auto, or a dispatcher's name")
    p.add_argument("--kernel", default="auto", help="auto, or a kernel's name")
    p.add_argument("--dtype", choices=sorted(FLOATS), help="default: the checkpoint's")
    p.add_argument(
        "--threads", type=int, help="threads a rank (default: its share of the cores; 1 with --exact)"
    )
    add_watching(p)
    add_verbose(p)
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; 0 also if a signal ended it with everything written."""
    # From the first moment: a job that is pre-empted while it loads has lost nothing either.
    return _run(args, listen_for_stop())


def _run(args: argparse.Namespace, told: Callable[[], bool]) -> int:
    world = attach(args)
    start_logging(world, args.verbose)
    request = agreed(world.comm, lambda: _request(args, world.rank == 0))
    grid = ProcessGrid.create(
        world, ep=args.ep, etp=args.etp, device=pick_device(world, args.device), transport=args.transport
    )
    torch.set_num_threads(args.threads or (1 if args.exact else world.threads()))
    console = make_console(world)
    console.print(
        f"{world.size} ranks on {world.num_nodes} nodes, {torch.get_num_threads()} threads each | {grid.shape} | {where(grid)}"
    )
    tokens = agreed(world.comm, lambda: Tokens(request.checkpoint, request.chat))
    work = prepare(world.comm, request, tokens, args.resume)
    if not work.queue:
        finish_only(world.comm, request, work)
        console.print(_counts(request, work, 0, work.answered), soft_wrap=True)
        return 0
    loaded = _load(args, grid, request, console)
    outcome = _answer(grid, request, work, tokens, loaded, told)
    console.print(_counts(request, work, outcome.answers, work.answered), soft_wrap=True)
    if outcome.tokens:
        console.print(_speed(outcome), soft_wrap=True)
    return 0


def _request(args: argparse.Namespace, first: bool) -> Request:
    """Everything that can be wrong with the words before any rank loads or writes anything.

    ``first``: whether this is the rank that reads prompts and writes answers; the others need not see those files.
    """
    batch = args.batch or (1 if args.exact else BATCH)
    for name, value in (
        ("max-new-tokens", args.max_new_tokens),
        ("batch", args.batch),
        ("prefill-tokens", args.prefill_tokens),
        ("threads", args.threads),
    ):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if args.exact and batch > 1:
        raise ValueError(
            f"--exact --batch {batch}: sequences of one batch change each other's rounding; leave --batch out"
        )
    if "" in args.stop:
        raise ValueError("--stop '': an empty text would end every answer; give at least one character")
    out = args.out or args.prompts.with_suffix(".answers.jsonl")
    if first:
        _check_files(args.prompts, out, args.resume)
    with Checkpoint(args.checkpoint) as checkpoint:
        dtype = FLOATS[args.dtype] if args.dtype else checkpoint.dtype
    return Request(
        checkpoint=args.checkpoint,
        prompts=args.prompts,
        out=out,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        max_new_tokens=args.max_new_tokens,
        stops=tuple(args.stop),
        chat=args.chat,
        batch=batch,
        prefill_tokens=args.prefill_tokens,
        dtype=dtype,
        exact=args.exact,
    )


def _check_files(prompts: Path, out: Path, resume: bool) -> None:
    if not prompts.is_file():
        raise ValueError(f"{prompts}: no such file; give a text file or a .jsonl as --prompts")
    if out.exists() and not resume:
        raise ValueError(f"{out}: exists; give --resume to keep its answers, or another --out")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist; make it, or give another --out")


def _load(args: argparse.Namespace, grid: ProcessGrid, request: Request, console: Console) -> LoadedModel:
    options = ExpertOptions(args.dispatcher, args.kernel, args.exact)
    begin = time.monotonic()
    with Meter(grid.world, "loading", 0, in_bytes=True) as meter:
        loaded = load_model(
            request.checkpoint, grid, request.dtype, options, meter.advance, total=meter.set_total
        )
    read = sum(grid.world.comm.all_gather_object(loaded.bytes_read))
    layer = loaded.layers[0]
    console.print(
        f"{type(loaded.model).__name__}: {loaded.dense_bytes / 1e6:.1f} MB dense, {loaded.expert_bytes / 1e6:.1f} MB of "
        f"experts on rank 0; all ranks read {read / 1e6:.1f} MB in {time.monotonic() - begin:.1f} s | "
        f"{layer.dispatcher.name} dispatch, {layer.kernel.name if layer.kernel else 'no'} kernel",
        soft_wrap=True,
    )
    return loaded


def _answer(
    grid: ProcessGrid,
    request: Request,
    work: Work,
    tokens: Tokens,
    loaded: LoadedModel,
    told: Callable[[], bool],
) -> Outcome:
    begin = time.monotonic()
    with Meter(grid.world, "answering", len(work.queue)) as meter:

        def tell(progress: Progress) -> None:
            speed = progress.tokens / max(1e-9, time.monotonic() - begin)
            meter.show(progress.done, f"{speed:.0f} tokens/s, load {progress.imbalance:.2f}")

        return generate(grid.world.comm, request, work, tokens, loaded, told, tell)


def _counts(request: Request, work: Work, new: int, before: int) -> str:
    """What was done, in one line; what is left and what was refused, if anything."""
    text = f"{request.out}: {new + before} of {len(work.order)} prompts answered"
    text += f", {before} of them before" if before else ""
    lines = "1 line" if work.refused == 1 else f"{work.refused} lines"
    text += f"; {lines} refused, see {errors_path(request.out)}" if work.refused else ""
    left = len(work.order) - new - before
    return text + (f"; stopped by SIGTERM, {left} are left: run again with --resume" if left else "")


def _speed(outcome: Outcome) -> str:
    return (
        f"{outcome.tokens} tokens in {outcome.seconds:.1f} s, {outcome.tokens / outcome.seconds:.0f} tokens/s, "
        f"load imbalance {outcome.progress.imbalance:.2f} (max/mean)"
    )
