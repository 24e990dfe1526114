"""One rank's failure ends the job everywhere within seconds, with a report of all ranks and a non-zero code."""

import re
import sys
import time
from pathlib import Path

import pytest
from launch import ALONE, can_mount, mpirun

LIBRARY = """
import os, signal, sys, threading, time
import torch
from xpar.comm import ProcessGrid, World, run
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.communicator import Tag
from xpar.comm.handshake import handshake
def main():
    world = World.attach(deadlines=Deadlines(start=30, step=2))
    for step in range(3):
        handshake(world.comm, Tag("plan", 4, step))
    if world.rank == 1:
        print("at", time.time(), flush=True)
        {fault}
    wait_for_all(world)
    time.sleep(30)
def wait_for_all(world):
    world.comm.all_gather_v(torch.ones(3, 5))
def does_something_else():
    time.sleep(60)
sys.exit(run(main))
"""
WHERE = "rank 1 on .*: "
SIZES = r"all_gather_v #4 of group world \(3 rows of 20 B\), layer 4, step 2"
LATE = rf"{SIZES}: not finished after 2 s; where every rank is:"
MISSING = "never arrived in all_gather_v #4: rank 1 on "
UNSEEN = "killed, out of memory, or crashed"
"""Of a process whose launcher has taken note of its end before anybody could look."""
ENDED = r"\[rank 0 on .*\] the process of rank 1 on .* has ended without a word: "
GONE = WHERE + "its process is gone; in no collective, the last was plan #3"
# What rank 1 does, on how many ranks, and what stderr must say.
FAULTS = {
    "exception": (
        2,
        "raise KeyError('lost expert')",
        ["lost expert", WHERE + "failed; the last was plan #3"],
    ),
    "exit": (3, "sys.exit(3)", ["SystemExit: 3", WHERE + "failed; the last was plan #3"]),
    "thread": (
        2,
        "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join(); time.sleep(30)",
        ["ZeroDivisionError", WHERE + "failed; the last was plan #3"],
    ),
    "skips a collective": (
        3,
        "does_something_else()",
        [LATE, WHERE + "in no collective for .* the last was plan #3", MISSING, "in does_something_else"],
    ),
    "stopped": (3, "os.kill(os.getpid(), signal.SIGSTOP)", [LATE, WHERE + "its process is stopped", MISSING]),
    "ends early": (2, "sys.exit(0)", [LATE, WHERE + "its program has ended", MISSING]),
    "crash": (
        2,
        "os.kill(os.getpid(), signal.SIGSEGV)",
        ["Fatal Python error: Segmentation fault", "in main", ENDED + rf"(SIGSEGV \(a crash|{UNSEEN})", GONE],
    ),
    "killed": (
        2,
        "os.kill(os.getpid(), signal.SIGKILL)",
        [ENDED + rf"(SIGKILL \(out of memory|{UNSEEN})", GONE],
    ),
}
AT_ONCE = ("crash", "killed")
"""Launchers kill the others some tens of milliseconds later: what stands there is where they were when the rank died, and
on a machine that is busy beyond that the launcher may be first."""
TRIES = 3


@pytest.mark.parametrize("fault", FAULTS)
def test_failure_of_one_rank_ends_the_job(fault: str) -> None:
    n, source, expected = FAULTS[fault]
    for _ in range(TRIES if fault in AT_ONCE else 1):
        job = mpirun(n, [sys.executable, "-c", LIBRARY.format(fault=source)], timeout=100)
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
    """Hydra does not pass an abort on to a node whose rank is outside MPI: the ranks end each other."""
    hosts = tmp_path / "hosts"
    hosts.write_text("a:2\nb:1\n")
    source = LIBRARY.format(fault="does_something_else()").replace("world.rank == 1", "world.rank == 2")
    job = mpirun(3, [sys.executable, "-c", source], timeout=100, env={"HYDRA_HOST_FILE": str(hosts)})
    assert time.time() - float(job.stdout.split()[1]) < 30  # the rank sleeps for 60 s
    assert job.returncode != 0 and job.stderr.count("where every rank is:") == 1, job.stderr
    assert re.search("rank 2 on .*: in no collective for .* the last was plan #3", job.stderr), job.stderr
    assert (
        "never arrived in all_gather_v #4: rank 2 on" in job.stderr and "in does_something_else" in job.stderr
    )


def test_a_rank_that_dies_unnoticed_is_missed_by_its_neighbour() -> None:
    """As where the launcher lets the others wait: the process that dies is not the launcher's own child."""
    source = """
import os, sys, time
from mpi4py import MPI
from xpar.comm import run
from xpar.comm.watchdog import watchdog
from xpar.comm.watchdog.status_board import StatusBoard
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.death_lock import DeathLock
DeathLock.hold = lambda self: False  # as on a machine without such locks
def main():
    world = MPI.COMM_WORLD
    child = os.fork() if world.rank == 1 else 0
    if world.rank == 1 and not child:
        time.sleep(60)
    introduce = StatusBoard.introduce
    if child:  # this rank's row names its child
        getpid, os.getpid = os.getpid, lambda: child
    watching = watchdog.Watchdog.start(world, world, [0] * world.size, Deadlines())
    if child:
        os.getpid = getpid
        world.Barrier()
        os.kill(child, 9)
        os.waitpid(child, 0)
    else:
        world.Barrier()
    time.sleep(40)
sys.exit(run(main))
"""
    job = mpirun(2, [sys.executable, "-c", source], timeout=60)
    assert job.returncode != 0
    assert re.search(ENDED + f"(SIGKILL|{UNSEEN})", job.stderr), job.stderr
    assert re.search(WHERE + "its process is gone; in no collective", job.stderr), job.stderr


def test_impossible_grid_is_one_message_and_no_traceback() -> None:
    source = LIBRARY.format(fault="pass").replace(
        "wait_for_all(world)\n", "ProcessGrid.create(world, tp=5)\n", 1
    )
    job = mpirun(2, [sys.executable, "-c", source], timeout=40)
    assert job.returncode == 1
    assert job.stderr.count("tp=5 does not divide 2 ranks") == 1
    assert "Traceback" not in job.stderr


def test_other_shapes_and_other_collectives_are_named_in_debug_mode() -> None:
    source = """
import sys
import torch
from xpar.comm import World, run
from xpar.comm.watchdog.watchdog import WatchdogOptions
def main():
    comm = World.attach(watchdog=WatchdogOptions(check_collectives=True)).comm
    send = [1, 1] if comm.rank == 0 else [2, 0]
    recv = [1, 1] if comm.rank == 0 else [1, 0]
    comm.all_to_all_v(torch.ones(2, 5), send, recv).wait()
sys.exit(run(main))
"""
    job = mpirun(2, [sys.executable, "-c", source], timeout=60)
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


LOOKED_AT = """
import os, signal, time
from xpar.comm import World, run
def stands_still(world):
    if world.rank == 1:
        time.sleep(2)
        os.kill(int(pid), signal.SIGUSR1)
        time.sleep(1)
    world.comm.barrier()
def main():
    global pid
    world = World.attach()
    pid = world.comm.all_gather_object(os.getpid())[0]
    stands_still(world)
    os.write(1, b"went on %d\\n" % world.rank)  # in one piece, beside the other rank's
run(main)
"""


def test_usr1_shows_the_stacks_of_a_job_that_goes_on() -> None:
    """Rank 0 is shown where it waits, blocked inside MPI, and finishes all the same."""
    job = mpirun(2, [sys.executable, "-c", LOOKED_AT], timeout=40)
    assert job.returncode == 0, job.stderr
    assert "in barrier" in job.stderr and "in stands_still" in job.stderr
    assert sorted(job.stdout.splitlines()) == ["went on 0", "went on 1"]


def test_usr1_of_the_program_stays_its_own() -> None:
    source = """
import signal
from xpar.comm import run
signal.signal(signal.SIGUSR1, lambda *_: print("mine"))
run(lambda: signal.raise_signal(signal.SIGUSR1))
"""
    job = mpirun(1, [sys.executable, "-c", source], timeout=40)
    assert (job.returncode, job.stdout) == (0, "mine\n"), job.stderr
