"""A job whose second rank is a forked child that dies without the launcher's notice.

Robust locks are switched off, as on a machine without them: the neighbour must notice the death by itself.
"""

import os
import sys
import time

from mpi4py import MPI

from xpar.comm import Deadlines, run
from xpar.comm.watchdog.death_lock import DeathLock
from xpar.comm.watchdog.watchdog import Watchdog, WatchdogOptions


def main() -> None:
    world = MPI.COMM_WORLD
    child = os.fork() if world.rank == 1 else 0
    if world.rank == 1 and not child:
        time.sleep(60)
    own_number = os.getpid
    if child:  # this rank's row names the child
        os.getpid = lambda: child
    Watchdog.start(world, world, [0] * world.size, Deadlines(), WatchdogOptions())
    if child:
        os.getpid = own_number
        world.Barrier()
        os.kill(child, 9)
        os.waitpid(child, 0)
    else:
        world.Barrier()
    time.sleep(40)


DeathLock.acquire = lambda self: False  # type: ignore[method-assign]
sys.exit(run(main))
