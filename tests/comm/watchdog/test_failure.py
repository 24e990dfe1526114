"""One rank's failure ends the job everywhere within seconds, with a report of all ranks."""

import re
import sys
import time
from pathlib import Path

import pytest
from launch import ALONE, can_mount, mpirun, python_program

WHERE = "rank 1 on .*: "
SIZES = r"all_gather_v #4 of group world \(3 rows of 20 B\), layer 4, step 2"
LATE = rf"{SIZES}: not finished after 2 s; where every rank is:"
MISSING = "never arrived in all_gather_v #4: rank 1 on "
UNSEEN = "killed, out of memory, or crashed"
"""The cause of death of a process that its launcher has already waited for."""
ENDED = r"\[rank 0 on .*\] the process of rank 1 on .* has ended without a word: "
GONE = WHERE + "its process is gone; in no collective, the last was plan #3"
# Fault of rank 1 (tests/programs/one_rank_fails.py) -> number of ranks, and what stderr must say.
FAULTS = {
    "exception": (2, ["lost expert", WHERE + "failed; the last was plan #3"]),
    "exit": (3, ["SystemExit: 3", WHERE + "failed; the last was plan #3"]),
    "thread": (2, ["ZeroDivisionError", WHERE + "failed; the last was plan #3"]),
    "skips a collective": (
        3,
        [LATE, WHERE + "in no collective for .* the last was plan #3", MISSING, "in does_something_else"],
    ),
    "stopped": (3, [LATE, WHERE + "its process is stopped", MISSING]),
    "ends early": (2, [LATE, WHERE + "its program has ended", MISSING]),
    "crash": (
        2,
        ["Fatal Python error: Segmentation fault", "in main", ENDED + rf"(SIGSEGV \(a crash|{UNSEEN})", GONE],
    ),
    "killed": (2, [ENDED + rf"(SIGKILL \(out of memory|{UNSEEN})", GONE]),
}
AT_ONCE = ("crash", "killed")
"""Faults after which launchers kill the other ranks within some tens of milliseconds. The report shows where
they were when the rank died. On a busy machine the launcher may come first, so that these faults have several
tries."""
TRIES = 3


@pytest.mark.parametrize("fault", FAULTS)
def test_failure_of_one_rank_ends_the_job(fault: str) -> None:
    n, expected = FAULTS[fault]
    for _ in range(TRIES if fault in AT_ONCE else 1):
        job = mpirun(n, python_program("one_rank_fails", fault, "1"), timeout=100)
        seconds = time.time() - float(job.stdout.split()[1])
        assert seconds < 25, job.stderr  # 5 and the deadline of 2, on a machine that does nothing else
        assert job.returncode != 0
        if "where every rank is:" in job.stderr:
            break
    for text in expected:
        assert re.search(text, job.stderr), job.stderr
    assert job.stderr.count("where every rank is:") == 1, job.stderr
    if fault not in AT_ONCE:
        assert re.search(rf"rank 0 on .*: in {SIZES}, for", job.stderr) and "in wait_for_all" in job.stderr


def test_a_rank_alone_on_its_node_is_named_and_ended(tmp_path: Path) -> None:
    """Ranks end each other: Hydra passes no abort on to a node whose rank is outside MPI."""
    hosts = tmp_path / "hosts"
    hosts.write_text("a:2\nb:1\n")
    words = python_program("one_rank_fails", "skips a collective", "2")
    job = mpirun(3, words, timeout=100, env={"HYDRA_HOST_FILE": str(hosts)})
    assert time.time() - float(job.stdout.split()[1]) < 30  # the rank sleeps for 60 s
    assert job.returncode != 0 and job.stderr.count("where every rank is:") == 1, job.stderr
    assert re.search("rank 2 on .*: in no collective for .* the last was plan #3", job.stderr), job.stderr
    assert (
        "never arrived in all_gather_v #4: rank 2 on" in job.stderr and "in does_something_else" in job.stderr
    )


def test_a_rank_that_dies_unnoticed_is_missed_by_its_neighbour() -> None:
    """The process that dies is not the launcher's own child, so that the launcher waits."""
    job = mpirun(2, python_program("unnoticed_death"), timeout=60)
    assert job.returncode != 0
    assert re.search(ENDED + f"(SIGKILL|{UNSEEN})", job.stderr), job.stderr
    assert re.search(WHERE + "its process is gone; in no collective", job.stderr), job.stderr


def test_impossible_grid_is_one_message_and_no_traceback() -> None:
    job = mpirun(2, python_program("one_rank_fails", "impossible grid", "1"), timeout=40)
    assert job.returncode == 1
    assert job.stderr.count("tp=5 does not divide 2 ranks") == 1
    assert "Traceback" not in job.stderr


def test_other_shapes_and_other_collectives_are_named_in_debug_mode() -> None:
    job = mpirun(2, python_program("uneven_exchange"), timeout=60)
    assert job.returncode == 1
    text = "rank 1 sends 2 rows to rank 0, which expects 1 in all_to_all_v of float32 [5]"
    assert job.stderr.count(text) == 1 and "Traceback" not in job.stderr, job.stderr


@pytest.mark.skipif(not can_mount(), reason="no mounts of one's own")
def test_a_full_shared_memory_is_one_line_a_rank_and_no_crash() -> None:
    """MPI itself would be killed by a bus error, without a word, as soon as it is started."""
    full = f"mount -t tmpfs -o size=100k tmpfs /dev/shm; exec {sys.executable} -m xpar.engine doctor"
    job = mpirun(2, [*ALONE, "sh", "-c", full], timeout=60)
    assert job.returncode != 0 and "Traceback" not in job.stderr, job.stderr
    assert re.search("xpar: error: /dev/shm on .* has 0.1 MB left, and MPI needs a few a rank", job.stderr)


def test_usr1_shows_the_stacks_of_a_job_that_goes_on() -> None:
    """Rank 0 is shown where it waits, blocked inside MPI, and finishes all the same."""
    job = mpirun(2, python_program("signal_usr1"), timeout=40)
    assert job.returncode == 0, job.stderr
    assert "in barrier" in job.stderr and "in stands_still" in job.stderr
    assert sorted(job.stdout.splitlines()) == ["went on 0", "went on 1"]


def test_usr1_of_the_program_stays_its_own() -> None:
    job = mpirun(1, python_program("own_usr1_handler"), timeout=40)
    assert (job.returncode, job.stdout) == (0, "mine\n"), job.stderr
