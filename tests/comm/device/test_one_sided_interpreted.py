"""Runs the tests of the one-sided exchange in Triton's interpreter on 1, 2 and 3 ranks."""

import faulthandler
import sys
from pathlib import Path

import pytest
from launch import mpirun, support_on_path

FOLDER = Path(__file__).parents[2] / "one_sided"
PROGRAM = Path(__file__).parents[2] / "programs/one_sided_failure.py"


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


@pytest.mark.parametrize("way", ["raises", "stays away"])
def test_a_late_rank_and_a_failure_are_reported(way: str) -> None:
    """An exception ends the waiting of the peers' kernels at once; a late rank is reported with its layer."""
    faulthandler.cancel_dump_traceback_later()
    done = mpirun(
        2,
        [sys.executable, str(PROGRAM), "100000" if way == "raises" else "3", way],
        timeout=100,
        env={"TRITON_INTERPRET": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", **support_on_path()},
    )
    assert done.returncode != 0
    if way == "raises":
        assert "lost expert" in done.stderr
        assert "the kernel of rank 0 ended: one-sided exchange of group world: rank 1 gave up" in done.stdout
    else:
        assert "exchange 1 of layer 7: rank 1 has not sent its rows of tokens 3 s after rank 0" in done.stderr
        assert "where every rank is" in done.stderr
