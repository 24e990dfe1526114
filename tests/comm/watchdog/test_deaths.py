"""A rank's death is noticed before its launcher ends the others; SIGTERM is reported."""

import mmap
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from launch import mpirun, python_program

from xpar.comm.watchdog import stack_dump
from xpar.comm.watchdog.death_lock import LOCK_BYTES, DeathLock
from xpar.comm.watchdog.status_board import CALL, LOCK, REPORTED, ROW_BYTES, SELF, StatusBoard


@pytest.mark.parametrize("hosts", ["a:3", "a:1,b:2"])
def test_a_job_that_sigterm_ends_reports_once_where_every_rank_is(tmp_path: Path, hosts: str) -> None:
    """Also of ranks that are blocked inside MPI, where no Python handler runs."""
    (tmp_path / "hosts").write_text(hosts.replace(",", "\n") + "\n")
    job = mpirun(
        3,
        python_program("sigterm_in_collective"),
        timeout=60,
        env={"HYDRA_HOST_FILE": str(tmp_path / "hosts")},
    )
    assert job.returncode != 0
    assert job.stderr.count("told to end by SIGTERM; where every rank is:") == 1, job.stderr
    lines = {line.strip().partition(" on ")[0]: line for line in job.stderr.splitlines() if " on " in line}
    assert "in no collective for" in lines["rank 1"] and "the last was plan #1" in lines["rank 1"]
    for rank in ("rank 0", "rank 2"):
        assert "in all_gather_v #2 of group world (3 rows of 20 B), layer 4, step 7, for" in lines[rank]


def test_sigterm_of_a_child_or_with_a_handler_of_the_program_ends_nothing() -> None:
    job = mpirun(2, python_program("sigterm_handlers"), timeout=60)
    assert job.returncode == 0 and "where every rank is" not in job.stderr, job.stderr
    assert sorted(job.stdout.splitlines()) == ["mine 0", "mine 1", "went on 0", "went on 1"]


@pytest.mark.parametrize(
    ("sent", "text"),
    [(signal.SIGKILL, "SIGKILL (out of memory"), (signal.SIGSEGV, "SIGSEGV (a crash"), (None, "exit code 3")],
    ids=["killed", "crashed", "exit"],
)
def test_a_death_is_noticed_and_its_cause_known(
    tmp_path: Path, sent: signal.Signals | None, text: str
) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(2 * LOCK_BYTES))
    noticed: list[stack_dump.ExitCause] = []
    done = threading.Event()
    with path.open("r+b") as file:
        lock = DeathLock(mmap.mmap(file.fileno(), 2 * LOCK_BYTES), 0)
    assert lock.acquire()
    words = python_program("own_death_lock", str(path))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "True\n"

        def note() -> None:
            noticed.append(stack_dump.exit_cause(other.pid))
            done.set()

        lock.watch(LOCK_BYTES, note)
        assert not done.wait(0.3) and stack_dump.process_state(other.pid) == ""
        if sent is None:
            other.stdin.close()
        else:
            os.kill(other.pid, sent)
        assert done.wait(20) and noticed[0].text.startswith(text)
        assert noticed[0].by_signal == (sent is not None)


def test_a_row_has_room_for_its_lock_and_a_report_is_written_once() -> None:
    assert CALL.size + SELF.size <= LOCK and LOCK % 8 == 0
    assert ROW_BYTES - REPORTED.size >= LOCK + LOCK_BYTES
    memory = mmap.mmap(-1, 2 * ROW_BYTES)
    first, second = (StatusBoard(memory, local, 2, None, True) for local in range(2))
    assert first.claim_report() and not first.is_reported()
    first.set_reported()
    assert second.is_reported() and not second.claim_report()
