"""Runs the tests of the one-sided exchange in Triton's interpreter on 1, 2 and 3 ranks."""

import faulthandler
import sys
from pathlib import Path

import pytest
from launch import mpirun

FOLDER = Path(__file__).parents[2] / "one_sided"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_in_the_interpreter(ranks: int) -> None:
    words = [sys.executable, "-m", "mpi4py", "-m", "pytest", "--with-mpi", "-q", "--color=no"]
    # On a busy machine this takes longer than pytest lets a test be silent; it has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    done = mpirun(
        ranks,
        [*words, "-p", "no:cacheprovider", "-W", "ignore", str(FOLDER)],
        timeout=400,
        env={"TRITON_INTERPRET": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"},
        cwd=FOLDER.parents[1],
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
