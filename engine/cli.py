"""The command line of ``xpar``, which reads the options before it imports torch."""

import argparse
import atexit
import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Sequence

from xpar.engine.commands.parsers import CommandParser, add_commands
from xpar.engine.models.malloc import keep_freed_memory, without_collection

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``xpar`` with ``argv`` (default: this process's words); return the exit status."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))

    with without_collection():
        from xpar.comm.failure import run

    keep_freed_memory()  # not before torch is imported, which frees much
    return run(lambda: int(args.main(args)))


def run_process() -> int:
    """Run :func:`main` for the words of this process, which then ends without freeing its memory.

    Python would free some 600,000 objects one by one, for a second; the kernel takes all pages at once. After
    an error Python ends the process as always.
    """
    end = QuickEnd()
    atexit.register(end)
    end.status = main()
    return end.status


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line. Neither torch nor MPI is imported."""
    top = CommandParser(
        prog="xpar", description="MPI-native expert-parallel engine for mixture-of-experts models."
    )
    top.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    add_commands(top.add_subparsers(required=True, metavar="COMMAND"))
    return top


class QuickEnd:
    """An exit handler that ends the process without freeing its memory if ``status`` is 0.

    It is registered before all others, so that it is called after them. It does nothing with another status,
    or where the process has used a GPU, whose driver has handlers of its own.
    """

    status: int | None = None

    def __call__(self) -> None:
        torch = sys.modules.get("torch")
        if self.status != 0 or (torch is not None and torch.cuda.is_initialized()):
            return
        if "mpi4py.MPI" in sys.modules:
            from mpi4py import MPI

            if MPI.Is_initialized() and not MPI.Is_finalized():
                MPI.Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
        # Of the C library, which calls the handlers of MPICH: there it takes leave of its launcher. No thread
        # of this process gets the interpreter meanwhile.
        ctypes.PyDLL(None).exit(0)


class _PrintVersion(argparse.Action):
    """The option ``--version``, which reads the installed version only when it is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        sys.stdout.write(f"xpar {version('xpar')}\n")
        parser.exit()


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse ``argv`` on every rank; only the first rank prints help and errors."""
    silent = io.StringIO()
    with contextlib.ExitStack() as stack:
        if not _is_first():
            stack.enter_context(contextlib.redirect_stderr(silent))
            stack.enter_context(contextlib.redirect_stdout(silent))
        return parser().parse_args(argv)


def _is_first() -> bool:
    """Return whether the launcher's variables make this process rank 0: help must not need MPI."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"
