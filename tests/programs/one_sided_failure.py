"""Two ranks, of which rank 1 raises an exception while rank 0 waits for it in a kernel without a deadline."""

import sys
import time

import triton_interpreter

triton_interpreter.install()

import torch

from xpar.comm import Deadlines, World, run
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.device.watch import Watch
from xpar.kernels.gpu.limits import label_of
from xpar.kernels.gpu.one_sided import Step


def main() -> None:
    world = World.attach()
    window = PeerWindow(world.comm, torch.device("cpu"), Deadlines(finish=float(sys.argv[1])))
    watch = Watch(lambda problem: end(world, problem))
    window.report_to(watch, world.watchdog)
    exchange = window.exchange(Step((1, 1), 1, 32, 8, torch.float32))
    world.comm.barrier()
    if world.rank == 1:
        time.sleep(1.0)
        if sys.argv[2] == "raises":
            raise KeyError("lost expert")
        time.sleep(60)
    ids, experts = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    exchange.dispatch(torch.ones(1, 8), ids, torch.ones(1, 1), experts, experts, label=label_of(7))
    sys.stdout.write(f"the kernel of rank 0 ended: {window.problem()}\n")
    sys.stdout.flush()
    time.sleep(60)


def end(world: World, problem: str) -> None:
    assert world.watchdog is not None
    world.watchdog.fail(problem)


sys.exit(run(main))
