"""A job in which rank 1 sends SIGUSR1 to rank 0, blocked inside MPI; both go on."""

import os
import signal
import time

from xpar.comm import World, run


def stands_still(world: World, pid: int) -> None:
    if world.rank == 1:
        time.sleep(2)
        os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
    world.comm.barrier()


def main() -> None:
    world = World.attach()
    pid = world.comm.all_gather_object(os.getpid())[0]
    stands_still(world, pid)
    os.write(1, b"went on %d\n" % world.rank)  # in one piece, beside the other rank's line


run(main)
