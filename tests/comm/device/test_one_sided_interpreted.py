"""Runs the tests of the one-sided exchange in Triton's interpreter on 1, 2 and 3 ranks."""

import sys
from pathlib import Path

import pytest
from launch import mpirun

FOLDER = Path(__file__).parents[2] / "one_sided"


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*_mpi.py")))
def test_in_the_interpreter(file: str, ranks: int) -> None:
    words = [sys.executable, "-m", "mpi4py", "-m", "pytest", "--with-mpi", "-q", "--color=no"]
    done = mpirun(
        ranks,
        [*words, "-p", "no:cacheprovider", "-W", "ignore", str(FOLDER / file)],
        timeout=240,
        env={"TRITON_INTERPRET": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"},
        cwd=FOLDER.parents[1],
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
