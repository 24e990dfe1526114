"""The connections that move device tensors in this job, one for every group of ranks."""

import atexit
import faulthandler
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device.backend import DeviceBackend, Markers
from xpar.comm.device.communicator import DeviceCommunicator
from xpar.comm.device.mpi_backend import MpiBackend
from xpar.comm.device.nccl_backend import NcclBackend
from xpar.comm.device.nccl_communicator import NcclCommunicator
from xpar.comm.device.nccl_library import Library, open_library
from xpar.comm.device.staged_backend import StagedBackend
from xpar.comm.device.transport_choice import MPI, NCCL, TransportChoice, fall_back
from xpar.comm.device.watch import Watch
from xpar.comm.failure import AgreedError
from xpar.comm.mpi_communicator import MpiCommunicator
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.reporter import EXIT_CODE

log = logging.getLogger("xpar.comm")
ABORT_S = 10.0
"""seconds for MPI_Abort to return; then the process ends itself"""


class Transport:
    """Makes device communicators of MPI communicators.

    Groups of the same ranks have one connection in common.

    Args:
        choice: How the tensors travel, and why.
        device: The device of the tensors.
        connect: Makes the backend of one group; collective over the group.
        watch: Follows the work on the GPU, if anything does.
        finish: The deadline of work that :meth:`follow` is asked to follow, in seconds.
    """

    def __init__(
        self,
        choice: TransportChoice,
        device: torch.device,
        connect: Callable[[MpiCommunicator], DeviceBackend],
        watch: Watch | None = None,
        finish: float = Deadlines.finish,
    ) -> None:
        self.choice, self.device, self.watch, self._connect = choice, device, watch, connect
        self._markers, self._finish = Markers(device), finish
        self._backends: dict[tuple[int, ...], DeviceBackend] = {}
        atexit.register(self.close)  # while CUDA and MPI are still there

    def wrap(self, host: Communicator) -> Communicator:
        """Make the device communicator of a group; collective.

        A group of one moves nothing and is returned as it is.
        """
        if not isinstance(host, MpiCommunicator):
            return host
        if host.world_ranks not in self._backends:
            self._backends[host.world_ranks] = self._connect(host)
        return DeviceCommunicator(host, self.device, self._backends[host.world_ranks], self.wrap)

    def follow(self, what: str) -> None:
        """Have the watch follow the current stream's work so far, such as a replayed recording."""
        if self.watch is not None:
            self.watch.add(self._markers.record(), what, self._finish, lambda: None)

    def close(self) -> None:
        """Close every connection, the last one first; collective; runs when the process ends."""
        atexit.unregister(self.close)
        while self._backends:
            self._backends.popitem()[1].close()
        if self.watch is not None:
            self.watch.close()


def open_transport(
    world: Communicator,
    device: torch.device,
    choice: TransportChoice,
    deadlines: Deadlines,
    *,
    required: bool = False,
    library: Library | None = None,
    host: str | None = None,
) -> Transport:
    """Open the chosen transport and connect the group of all ranks; collective over ``world``.

    Args:
        world: The group of all ranks.
        device: This rank's device.
        choice: The transport. If it is NCCL, and NCCL turns out not to connect, rows are staged instead and
            the transport's own choice says why.
        deadlines: Deadlines of work on the GPU.
        required: Raise instead of staging.
        library: NCCL; opened here by default.
        host: The host name for NCCL, see :func:`~xpar.comm.device.transport_choice.host_override`.

    Raises:
        AgreedError: The transport does not work, the same text on every rank.
    """
    if choice.chosen is NCCL:
        if host is not None:
            os.environ.setdefault("NCCL_HOSTID", host)  # read when NCCL first joins a communicator
        nccl = nccl_transport(world, device, choice, deadlines, library or open_library())
        try:
            nccl.wrap(world)
            return nccl
        except AgreedError as error:
            nccl.close()
            if required:
                raise
            choice = fall_back(choice, str(error).strip().splitlines()[0])
    if choice.chosen is MPI:
        direct = Transport(choice, device, lambda host: _connect_mpi(host, device))
        direct.wrap(world)
        return direct
    return Transport(choice, device, lambda host: StagedBackend(host, device))


def nccl_transport(
    world: Communicator,
    device: torch.device,
    choice: TransportChoice,
    deadlines: Deadlines,
    library: Library,
    blocking: bool = True,
) -> Transport:
    """Make a transport of NCCL connections, each tested when made; as :func:`open_transport`.

    The job of ``world`` ends if work on the GPU is late. Ranks connect without blocking, because such a
    connection can be given up. ``blocking``: whether they then connect once more, by calls that block, which
    launch operations in half the time; the first connection serves on where that fails.
    """
    watch = Watch(lambda problem: end_job(world, problem))

    def connect(host: MpiCommunicator) -> DeviceBackend:
        first = _connect_nccl(host, device, deadlines, library, watch, blocking=False)
        if not blocking:
            return first
        try:
            second = _connect_nccl(host, device, deadlines, library, watch, blocking=True)
        except AgreedError as error:
            log.info("NCCL launches of group %s do not block: %s", host.name, str(error).splitlines()[0])
            return first
        first.close()
        return second

    return Transport(choice, device, connect, watch, deadlines.finish)


def _connect_nccl(
    host: MpiCommunicator,
    device: torch.device,
    deadlines: Deadlines,
    library: Library,
    watch: Watch,
    blocking: bool,
) -> NcclBackend:
    backend = NcclBackend(NcclCommunicator.connect(library, host, deadlines, watch, device, blocking), device)
    backend.check(host)
    return backend


def _connect_mpi(host: MpiCommunicator, device: torch.device) -> DeviceBackend:
    backend = MpiBackend(host, device)
    backend.check()
    return backend


def end_job(world: Communicator, problem: str) -> None:
    """Report ``problem`` and end the job on all ranks. Called by the thread of :class:`Watch`.

    This rank's main thread may never return.
    """
    if isinstance(world, MpiCommunicator) and world.watchdog is not None:
        world.watchdog.fail(problem, EXIT_CODE)
    rank = world.world_ranks[world.rank]
    sys.stderr.write(f"[rank {rank} on {socket.gethostname()}] {problem}; ending the job on every rank\n")
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
    last = threading.Timer(ABORT_S, os._exit, (EXIT_CODE,))  # if even MPI_Abort does not return
    last.daemon = True
    last.start()
    world.abort(EXIT_CODE)
