"""A job whose rank 1 is never let out of a call of NCCL that launches an operation."""

import time

import torch
from fake_nccl import FakeNccl

from xpar.comm import Deadlines, World, run
from xpar.comm.device.transport import nccl_transport
from xpar.comm.device.transport_choice import TRANSPORTS
from xpar.comm.mpi_communicator import MpiCommunicator
from xpar.kernels.choice import Choice


def main() -> None:
    world = World.attach()
    assert isinstance(world.comm, MpiCommunicator)
    choice = Choice(next(t for t in TRANSPORTS if t.name == "nccl"), ())
    library = FakeNccl(world.comm.mpi_comm)  # type: ignore[arg-type]
    deadlines = Deadlines(launch=0.5)
    group = nccl_transport(world.comm, torch.device("cpu"), choice, deadlines, library).wrap(world.comm)
    if world.rank == 1:
        library.hold = "all_gather"
        group.all_gather_v(torch.ones(2, 3), [2] * world.size)
    time.sleep(50)


run(main)
