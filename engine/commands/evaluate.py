"""``xpar evaluate``: run lm-evaluation-harness on a whole model, its experts spread over the ranks."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from xpar.comm.failure import agreed
from xpar.engine.commands import model_session
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.commands.options import at_least, attach, batch_size
from xpar.engine.console.logs import start_logging
from xpar.engine.console.terminal import make_console
from xpar.engine.generation.service import Service
from xpar.engine.generation.tokenizer import Tokenizer


def main(args: argparse.Namespace) -> int:
    """Run the harness on rank 0; the other ranks serve it."""
    world = attach(args)
    start_logging(world, args.verbose)
    args.checkpoint = find_checkpoint(world.comm, args.checkpoint)
    dtype = agreed(world.comm, lambda: _check(args))
    harness = agreed(world.comm, lambda: _harness(args.harness) if world.rank == 0 else None, patient=True)
    console = make_console(world)
    grid = model_session.make_grid(args, world, console)
    tokenizer = agreed(world.comm, lambda: Tokenizer(args.checkpoint))
    console.print(tokenizer.ends_note, soft_wrap=True, markup=False, highlight=False)
    loaded = model_session.load(args, grid, dtype, console)
    service = Service(world.comm, loaded, tokenizer, batch_size(args), args.prefill_tokens)
    if harness is None:
        service.serve()
    else:
        _evaluate(harness, service, args)
    console.print(model_session.memory(world.comm), soft_wrap=True)
    return 0


def _check(args: argparse.Namespace) -> torch.dtype:
    """Check the options and return the dtype; raise ValueError for options that do not fit."""
    if find_spec("lm_eval") is None:
        raise ValueError("xpar evaluate needs lm-evaluation-harness (pip install 'xpar[eval]')")
    at_least(batch=(args.batch, 1), prefill_tokens=(args.prefill_tokens, 1), threads=(args.threads, 1))
    batch_size(args)
    return model_session.dtype_of(args)


def _harness(words: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Make the harness's own command and parse its options; raise ValueError for words that it refuses."""
    from lm_eval._cli import HarnessCLI

    cli = HarnessCLI()
    with _words(["lm-eval", "run", "--model", "xpar", *words]):
        try:
            return cli, cli.parse_args()
        except SystemExit as stop:
            raise ValueError(
                f"lm-eval does not take {' '.join(words)} (status {stop.code}; see above)"
            ) from None


def _evaluate(harness: tuple[Any, argparse.Namespace], service: Service, args: argparse.Namespace) -> None:
    from lm_eval.utils import setup_logging

    from xpar.engine.generation.lm_eval import register_service

    setup_logging()
    register_service(service, str(args.checkpoint))
    cli, options = harness
    cli.execute(options)  # whatever it raises ends the job on all ranks
    service.end()


@contextmanager
def _words(words: list[str]) -> Iterator[None]:
    """Set ``sys.argv``, from which the harness reads its options, to ``words`` within the context."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before
