"""A job that goes on although SIGTERM comes to children and to ranks with a handler."""

import os
import signal
import sys
import time

import torch

from xpar.comm import World, run


def main() -> None:
    world = World.attach()
    child = os.fork()
    if child == 0:
        time.sleep(60)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"mine %d\n" % world.rank))
    os.kill(os.getpid(), signal.SIGTERM)
    world.comm.all_gather_v(torch.ones(3, 5))
    os.write(1, b"went on %d\n" % world.rank)


sys.exit(run(main))
