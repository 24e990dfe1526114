"""The end of a command's process: what others registered is done, and no memory is freed piece by piece."""

import subprocess
import sys

import pytest
from launch import clean_environment, mpirun

SOURCE = """
import atexit
import sys
from types import SimpleNamespace
from xpar.engine import cli

{before}

class Kept:
    def __del__(self):
        print("freed")

def main():
    global kept
    kept = Kept()
    atexit.register(print, "handler")
    return {status}

cli.main = main
sys.exit(cli.run_process())
"""


USED_A_GPU = "sys.modules['torch'] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))"


@pytest.mark.parametrize(
    ("before", "status", "printed"),
    [("", 0, "handler\n"), ("", 3, "handler\nfreed\n"), (USED_A_GPU, 0, "handler\nfreed\n")],
)
def test_only_a_command_that_succeeded_ends_at_once(before: str, status: int, printed: str) -> None:
    """And none that has used a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", SOURCE.format(before=before, status=status)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, printed, "")


ENDS_LATER = """
import sys
import time
from xpar.engine import cli

def main():
    from mpi4py import MPI

    def flush():
        if MPI.Is_finalized():
            time.sleep(0.5)
            sys.__stdout__.write("later\\n")
            sys.__stdout__.flush()

    if MPI.COMM_WORLD.rank:
        sys.stderr.flush = flush
    return 0

cli.main = main
sys.exit(cli.run_process())
"""


def test_the_launcher_waits_for_a_rank_that_is_still_ending() -> None:
    """MPICH's kills the others as soon as a rank has ended without taking leave of it."""
    done = mpirun(2, [sys.executable, "-c", ENDS_LATER])
    assert (done.returncode, done.stdout) == (0, "later\n"), done.stderr
