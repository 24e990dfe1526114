"""The command ``xpar``: one module of ``xpar.engine.commands`` per sub-command."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from xpar.comm.failure import run as run_guarded
from xpar.engine.commands import COMMANDS
from xpar.engine.models.malloc import keep_freed_memory

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``xpar`` with the words ``argv`` (the process's own by default) and return its exit status."""
    keep_freed_memory()
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    return run_guarded(lambda: int(args.main(args)))


def parser() -> argparse.ArgumentParser:
    """The command line of ``xpar``."""
    top = argparse.ArgumentParser(
        prog="xpar", description="MPI-native expert-parallel engine for mixture-of-experts models."
    )
    top.add_argument("--version", action="version", version=f"xpar {version('xpar')}")
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(subparsers)
    return top


def _parse(argv: list[str]) -> argparse.Namespace:
    """Every rank reads the same words; the first one answers for all."""
    shown = contextlib.nullcontext() if _is_first() else contextlib.redirect_stderr(io.StringIO())
    with shown, contextlib.nullcontext() if _is_first() else contextlib.redirect_stdout(io.StringIO()):
        return parser().parse_args(argv)


def _is_first() -> bool:
    """Whether this process speaks for the job. The launcher's variables: help must not need a working MPI."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"
