"""A job of two ranks that disagree about an all-to-all, with collectives compared."""

import sys

import torch

from xpar.comm import WatchdogOptions, World, run


def main() -> None:
    comm = World.attach(watchdog=WatchdogOptions(check_collectives=True)).comm
    send = [1, 1] if comm.rank == 0 else [2, 0]
    recv = [1, 1] if comm.rank == 0 else [1, 0]
    comm.all_to_all_v(torch.ones(2, 5), send, recv).wait()


sys.exit(run(main))
