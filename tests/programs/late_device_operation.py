"""A job whose rank 1 has an operation on its GPU that never ends, as its watch sees it."""

import time

from xpar.comm import World, run
from xpar.comm.device.transport import end_job
from xpar.comm.device.watch import Watch


def main() -> None:
    world = World.attach()
    if world.rank == 1:
        watch = Watch(lambda problem: end_job(world.comm, problem))
        watch.add(lambda: False, "all_to_all_v of 7 rows", 0.5, lambda: None)
        time.sleep(50)
    world.comm.barrier()


run(main)
