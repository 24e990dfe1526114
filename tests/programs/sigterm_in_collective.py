"""A job of three ranks that SIGTERM ends while two of them are blocked inside MPI."""

import os
import signal
import sys
import time

import torch

from xpar.comm import World, run
from xpar.comm.communicator import Tag
from xpar.comm.handshake import handshake


def main() -> None:
    world = World.attach()
    handshake(world.comm, Tag("plan", 4, 7))
    if os.fork() == 0:  # the child ends its rank as a launcher does
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    if world.rank == 1:
        time.sleep(60)
    world.comm.all_gather_v(torch.ones(3, 5))


sys.exit(run(main))
