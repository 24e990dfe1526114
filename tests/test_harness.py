"""The test harness itself: what a multi-rank session reports when ranks fail, skip, differ or hang."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import clean_environment, mpirun

HERE = Path(__file__).parent
HEAD = "import os, time, pytest\npytestmark = pytest.mark.mpi(deadline=2)\n"


def run_session(tmp_path: Path, source: str, n: int = 2, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``source`` as a test module on ``n`` ranks under a copy of this project's conftest."""
    for name in ("conftest.py", "support/mpi_session.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "test_inner_mpi.py").write_text(HEAD + source)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\naddopts = -ra -p no:cacheprovider\n")
    return mpirun(n, [sys.executable, "-m", "mpi4py", "-m", "pytest", "--with-mpi", *options], cwd=tmp_path)


def test_passes_once_for_all_ranks(tmp_path: Path) -> None:
    run = run_session(tmp_path, "def test_sum(comm):\n    assert comm.allreduce(1) == 3\n", 3)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"(\d+) passed in", run.stdout) == ["1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_of_one_rank_fails_all_and_the_rest_still_runs(tmp_path: Path, rank: int) -> None:
    source = f"""
def test_uneven(comm):
    if comm.rank == {rank}:
        print("said by the failing rank")
    assert comm.rank != {rank}, "the reason"

def test_after(comm):
    comm.Barrier()
"""
    run = run_session(tmp_path, source)
    assert run.returncode == 1
    assert "1 failed, 1 passed in" in run.stdout
    assert (
        f"rank {rank}:" in run.stdout
        and "the reason" in run.stdout
        and "said by the failing rank" in run.stdout
    )
    assert f"rank {1 - rank}:" not in run.stdout


def test_same_failure_on_all_ranks_is_shown_once(tmp_path: Path) -> None:
    run = run_session(tmp_path, "def test_no():\n    print('said')\n    assert 1 == 2\n", 3)
    assert run.returncode == 1
    assert run.stdout.count("E       assert 1 == 2") == 1, run.stdout
    assert "FAILED test_inner_mpi.py::test_no - rank 0, 1, 2: assert 1 == 2\n" in run.stdout


def test_failing_setup_of_one_rank_keeps_the_others_out_of_the_test(tmp_path: Path) -> None:
    source = """
@pytest.fixture
def half(comm):
    assert comm.rank == 0, "no fixture here"

def test_would_hang(half, comm):
    comm.Barrier()
"""
    run = run_session(tmp_path, source)
    assert run.returncode == 1
    assert "1 error in" in run.stdout and "no fixture here" in run.stdout


def test_skip_on_one_rank_only_is_a_failure(tmp_path: Path) -> None:
    source = """
def test_uneven_skip(comm):
    if comm.rank == 1:
        pytest.skip("only here")

def test_even_skip():
    pytest.skip("everywhere")
"""
    run = run_session(tmp_path, source)
    assert run.returncode == 1
    assert "1 failed, 1 skipped in" in run.stdout and "only here" in run.stdout


def test_rank_that_waits_for_ever_ends_the_job_with_its_stack(tmp_path: Path) -> None:
    source = """
def test_stuck(comm):
    if comm.rank == 0:
        the_wait_that_never_ends(comm)
    raise ValueError("why rank 1 never came")

def the_wait_that_never_ends(comm):
    comm.Barrier()
"""
    start = time.monotonic()
    run = run_session(tmp_path, source)
    assert time.monotonic() - start < 20
    assert run.returncode != 0
    assert "the_wait_that_never_ends" in run.stderr and "not finished after its deadline of 2 s" in run.stderr


def test_different_tests_on_ranks_stop_the_session(tmp_path: Path) -> None:
    source = """
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    raise ImportError("broken on rank 1")

def test_any(comm):
    comm.Barrier()
"""
    run = run_session(tmp_path, source)
    assert run.returncode == 1
    assert "ranks collected different tests" in run.stdout and "broken on rank 1" in run.stdout


def test_sizes_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    source = """
@pytest.mark.mpi(min_size=3)
def test_three(): pass

@pytest.mark.mpi(max_size=1)
def test_one(): pass

@pytest.mark.mpi(min_size=2, max_size=2)
def test_two(): pass
"""
    run = run_session(tmp_path, source)
    assert run.returncode == 0
    assert "1 passed, 2 deselected in" in run.stdout


def run_serial(tmp_path: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run a file with a test of each kind without MPI."""
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / name).write_text(
        "import sys, pytest\n"
        "@pytest.mark.mpi\ndef test_mpi(): pass\n"
        "def test_serial(): assert 'mpi4py' not in sys.modules\n"
    )
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    return subprocess.run(
        words, check=False, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
    )


def test_serial_run_leaves_mpi_tests_out_and_mpi_alone(tmp_path: Path) -> None:
    run = run_serial(tmp_path, "test_inner_mpi.py")
    assert run.returncode == 0, run.stdout
    assert "1 passed, 1 deselected in" in run.stdout


def test_a_test_that_ranks_would_not_read_is_refused(tmp_path: Path) -> None:
    run = run_serial(tmp_path, "test_inner.py")
    assert run.returncode != 0 and "test_inner.py::test_mpi has the mark mpi; move it to" in run.stderr, run
    (tmp_path / "test_another.py").write_text("raise ImportError('read by ranks')\n")
    source = "def test_sum(comm):\n    assert comm.allreduce(1) == 1\n"
    run = run_session(tmp_path, source, 1)
    assert run.returncode == 0 and "1 passed in" in run.stdout, run.stdout


def test_mpirun_kills_ranks_that_ignore_signals() -> None:
    stubborn = (
        # One write a rank: print sends the number and the newline apart, and another rank's may come between.
        "import signal, os; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'%d\\n' % "
        "os.getpid())\n"
    )
    with pytest.raises(TimeoutError, match="not finished after 2 s") as caught:
        mpirun(2, stubborn + "while True: pass", timeout=2)
    printed = str(caught.value).partition("not finished after 2 s")[2]
    pids = [int(word) for word in printed.split() if word.isdigit()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_mpirun_hands_back_status_and_output() -> None:
    code = "from mpi4py import MPI; import sys; print('out'); sys.exit(MPI.COMM_WORLD.rank and 3)"
    run = mpirun(2, code)
    assert run.returncode == 3 and "out" in run.stdout
