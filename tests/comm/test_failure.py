"""One rank's failure ends the job everywhere within seconds, with its traceback and a non-zero code."""

import sys
import time

import pytest
from launch import mpirun

LIBRARY = """
import sys, threading, time
from xpar.comm import World, run, ProcessGrid
def main():
    world = World.attach()
    if world.rank == 1:
        {fault}
    world.comm.barrier()
    time.sleep(30)
run(main)
"""
FAULTS = {
    "exception": "raise KeyError('lost expert')",
    "sys.exit": "sys.exit(3)",
    "thread": "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join(); time.sleep(30)",
}
SHOWN = {"exception": "lost expert", "sys.exit": "SystemExit: 3", "thread": "ZeroDivisionError"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("n", [2, 3])
def test_failure_of_one_rank_ends_the_job(fault: str, n: int) -> None:
    begin = time.monotonic()
    source = LIBRARY.format(fault=FAULTS[fault])
    job = mpirun(n, [sys.executable, "-c", source], timeout=40)
    assert time.monotonic() - begin < 20  # start-up included; the sleep of the others is 30 s
    assert job.returncode != 0
    assert "[rank 1 on " in job.stderr and SHOWN[fault] in job.stderr


def test_impossible_grid_is_one_message_and_no_traceback() -> None:
    source = LIBRARY.format(fault="pass").replace("world.comm.barrier()", "ProcessGrid.create(world, tp=5)")
    job = mpirun(2, [sys.executable, "-c", source.replace("run(main)", "sys.exit(run(main))")], timeout=40)
    assert job.returncode == 1
    assert job.stderr.count("tp=5 does not divide 2 ranks") == 1
    assert "Traceback" not in job.stderr


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
    print("went on", world.rank)
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
