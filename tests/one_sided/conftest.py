"""Tests of the one-sided exchange on ranks that run its kernels in Triton's interpreter, which must be chosen
first.

``tests/comm/device/test_one_sided_interpreted.py`` starts them; by hand:
``TRITON_INTERPRET=1 mpirun -n 2 python -m mpi4py -m pytest --with-mpi tests/one_sided``.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import World
from xpar.comm.communicator import Communicator
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.watchdog.deadlines import Deadlines

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]

HOST = torch.device("cpu")


@pytest.fixture(scope="session")
def world(comm: "Intracomm") -> World:
    return World.attach(comm, allow_singleton=True)


@pytest.fixture(scope="session")
def group(world: World) -> Communicator:
    return world.comm


@pytest.fixture
def window(group: Communicator) -> Iterator[PeerWindow]:
    """A window of its own, so that a test may break it."""
    opened = PeerWindow(group, HOST, Deadlines(connect=30, finish=30))
    yield opened
    opened.close()
