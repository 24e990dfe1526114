"""Failures of one rank: errors end the job everywhere, a user's mistake is one message.

Under ``mpirun python script.py`` an uncaught exception leaves the other ranks waiting for ever: Python exits
into ``MPI_Finalize``, which waits for them. ``sys.exit`` and exceptions in threads do the same.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import NoReturn, TypeVar

from xpar.comm.communicator import Communicator
from xpar.comm.handshake import CollectiveError
from xpar.comm.watchdog.sigterm import on_sigterm
from xpar.comm.watchdog.watchdog import Watchdog

T = TypeVar("T")


class AgreedError(CollectiveError):
    """A user's mistake, found on at least one rank and raised with the same text on all ranks."""


def agreed(comm: Communicator, attempt: Callable[[], T], doing: str = "", patient: bool = False) -> T:
    """Run ``attempt`` on every rank; if it raised on any, raise one error on all; collective.

    Args:
        comm: The ranks.
        attempt: The work of one rank, without any collective. ``ValueError`` and ``OSError`` count as the
            user's mistakes and give their message; any other exception is an error of this program and gives
            its traceback.
        doing: What the ranks attempt; the beginning of the message.
        patient: Whether ranks that are done sleep until the others are done, which leaves those the cores.

    Returns:
        This rank's result of ``attempt``.

    Raises:
        AgreedError: ``attempt`` raised on at least one rank.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = attempt()
    except (ValueError, OSError) as error:
        problem = str(error)
    except Exception:  # noqa: BLE001 - every rank must reach the exchange below
        problem = traceback.format_exc()
    if patient:
        comm.barrier(patient=True)
    problems = comm.all_gather_object(problem)
    failed = [r for r, p in enumerate(problems) if p is not None]
    if failed:
        raise AgreedError(_merge_problems(comm, problems, failed, doing))
    return result  # type: ignore[return-value]


def _merge_problems(comm: Communicator, problems: list[str | None], failed: list[int], doing: str) -> str:
    """Return the message for all ranks: the first rank's problem, and how many failed."""
    first = problems[failed[0]]
    prefix = f"{doing}: " if doing else ""
    if len(failed) == comm.size:
        return f"{prefix}{first}"
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    return f"{prefix}rank {comm.world_ranks[failed[0]]}{others}: {first}"


def run(main: Callable[[], int | None]) -> int:
    """Call ``main`` so that an exception or ``sys.exit(n)`` on any rank ends the whole job.

    Exceptions in threads end the job, too. Programs that use this library start with ``xpar.comm.run(main)``.
    A :class:`~xpar.comm.handshake.CollectiveError`, which every rank raises, is printed once, and every rank
    returns 1. Every other exception is reported by its rank and aborts the job. Returns the exit code of a
    clean run.
    """
    abort_on_failure()
    try:
        return main() or 0
    except CollectiveError as error:
        if _world_rank() in (0, None):
            sys.stderr.write(f"xpar: error: {error}\n")
        return 1
    except BaseException as error:
        if isinstance(error, SystemExit) and not _exit_code(error):
            return 0
        sys.excepthook(type(error), error, error.__traceback__)
        raise AssertionError("the hook of abort_on_failure ends the process") from error


def abort_on_failure() -> None:
    """Make uncaught exceptions in any thread of this process end the whole MPI job.

    SIGUSR1 shows the process's stacks, unless the program has a handler for it. A crash shows the stacks,
    too.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(file=sys.__stderr__ or 2)
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or 2, all_threads=True)
    sys.excepthook = _end_job
    threading.excepthook = lambda args: sys.excepthook(
        args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
    )


def report_failures(watchdog: Watchdog) -> None:
    """Let ``watchdog`` report when this rank fails, or gets a SIGTERM that no other handler takes."""
    if sys.excepthook is _end_job:
        sys.excepthook = partial(_end_job, watchdog=watchdog)
        on_sigterm(watchdog.reporter.end_on_sigterm)


def _exit_code(error: BaseException) -> int:
    """Return 1, or for ``sys.exit`` its argument: as in Python, 0 for nothing and 1 for a text."""
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _end_job(
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
    watchdog: Watchdog | None = None,
) -> NoReturn:
    """Print the error and end the job; the hook of :func:`abort_on_failure`."""
    rank, code = _world_rank(), _exit_code(error)
    who = f"[rank {rank} on {socket.gethostname()}] " if rank is not None else ""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stdout.flush()
    sys.stderr.write(f"{who}failed; ending the job on every rank\n{text}")
    sys.stderr.flush()
    time.sleep(0.3)  # lets the launcher collect what other ranks are just writing about their own failure
    if watchdog is not None and rank is not None:
        watchdog.mark_failing()
        watchdog.fail(f"{kind.__name__}, see above", code)
    if rank is not None:
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def _world_rank() -> int | None:
    """Return this process's rank; None without MPI, which importing mpi4py would start."""
    if "mpi4py.MPI" not in sys.modules:
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank if MPI.Is_initialized() and not MPI.Is_finalized() else None
