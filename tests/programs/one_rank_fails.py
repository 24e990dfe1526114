"""A job in whose third step one rank fails while the others wait in a collective.

Arguments: the fault, and the rank that has it. That rank prints the time before it fails.
"""

import os
import signal
import sys
import threading
import time

import torch

from xpar.comm import Deadlines, ProcessGrid, World, run
from xpar.comm.communicator import Tag
from xpar.comm.handshake import handshake


def main() -> None:
    fault, rank = sys.argv[1], int(sys.argv[2])
    world = World.attach(deadlines=Deadlines(start=30, step=2))
    for step in range(3):
        handshake(world.comm, Tag("plan", 4, step))
    if fault == "impossible grid":
        ProcessGrid.create(world, tp=5)
    if world.rank == rank:
        sys.stdout.write(f"at {time.time()}\n")
        sys.stdout.flush()
        FAULTS[fault]()
    wait_for_all(world)
    time.sleep(30)


def wait_for_all(world: World) -> None:
    world.comm.all_gather_v(torch.ones(3, 5))


def raise_error() -> None:
    raise KeyError("lost expert")


def fail_in_thread() -> None:
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    time.sleep(30)


def does_something_else() -> None:
    time.sleep(60)


def send_to_self(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


FAULTS = {
    "exception": raise_error,
    "exit": lambda: sys.exit(3),
    "thread": fail_in_thread,
    "skips a collective": does_something_else,
    "stopped": lambda: send_to_self(signal.SIGSTOP),
    "ends early": lambda: sys.exit(0),
    "crash": lambda: send_to_self(signal.SIGSEGV),
    "killed": lambda: send_to_self(signal.SIGKILL),
}

sys.exit(run(main))
