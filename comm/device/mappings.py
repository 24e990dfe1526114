"""The ways in which every rank of a group on one node maps the memory of all others."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.device.cuda_driver import Driver
from xpar.comm.failure import AgreedError, agreed

ROUND = 2 << 20
"""Windows are a multiple of this many bytes, which both ways come in on every GPU."""


class Mapping(Protocol):
    """Memory of every rank at addresses of this process.

    ``bytes`` [n] uint8: this rank's own. ``bases``: address here of each rank's. ``close_peers``, then, once
    every rank has done so, ``close_own`` give them back; neither is collective.
    """

    bytes: Tensor
    bases: tuple[int, ...]

    def close_peers(self) -> None: ...
    def close_own(self) -> None: ...


class _Array:
    """An address in the form in which torch takes it for a tensor."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _tensor(address: int, nbytes: int, device: torch.device) -> Tensor:
    """Return this rank's own memory as a tensor.

    Never a peer's: torch copies what it takes for memory of another device.
    """
    return torch.as_tensor(_Array(address, nbytes), device=device)


class UndoneMapping:
    """A base of mappings with two stacks of what closing undoes: of peers, and of this rank."""

    def __init__(self) -> None:
        self.bases: tuple[int, ...] = ()
        self._of_peers, self._own = ExitStack(), ExitStack()

    def close_peers(self) -> None:
        self._of_peers.close()

    def close_own(self) -> None:
        self._own.close()


class IpcMapping(UndoneMapping):
    """A mapping of plainly allocated memory by 64-byte handles; collective over ``group``."""

    way = "CUDA IPC handles"

    def __init__(self, group: Communicator, nbytes: int, device: torch.device) -> None:
        super().__init__()
        _attempt(self, group, lambda: self._open(group, nbytes, device))

    def _open(self, group: Communicator, nbytes: int, device: torch.device) -> None:
        def own() -> tuple[Driver, int, bytes]:
            driver = Driver()
            address = driver.allocate(nbytes)
            self._own.callback(driver.free, address)
            return driver, address, driver.export_ipc(address)

        driver, address, handle = agreed(group, own, self.way)
        handles = group.all_gather_object(handle)
        bases = [address] * group.size

        def peers() -> None:
            for n in range(1, group.size):  # ranks begin with different peers
                r = (group.rank + n) % group.size
                bases[r] = driver.open_ipc(handles[r])
                self._of_peers.callback(driver.close_ipc, bases[r])

        agreed(group, peers, self.way)
        self.bases, self.bytes = tuple(bases), _tensor(address, nbytes, device)


class DescriptorMapping(UndoneMapping):
    """A mapping of virtual memory by file descriptors over unix sockets; collective.

    ``seconds``: how long a descriptor may be on its way. The sockets' names are abstract: no file is left
    behind.
    """

    way = "file descriptors of virtual memory"

    def __init__(
        self, group: Communicator, nbytes: int, device: torch.device, seconds: float = 120.0
    ) -> None:
        super().__init__()
        _attempt(self, group, lambda: self._open(group, nbytes, device, seconds))

    def _open(self, group: Communicator, nbytes: int, device: torch.device, seconds: float) -> None:
        with ExitStack() as transfer:  # what is only needed until every rank has mapped everything
            job = group.all_gather_object(f"{os.getpid()}-{time.time_ns()}")[0]

            def own() -> tuple[Driver, int, int, socket.socket]:
                driver = Driver()
                index = device.index or 0
                if nbytes % driver.granularity(index):
                    raise ValueError(
                        f"{nbytes} bytes are no multiple of this GPU's {driver.granularity(index)}"
                    )
                handle = driver.create(nbytes, index)
                self._own.callback(driver.release, handle)
                address = self._map(driver, handle, nbytes, index, self._own)
                descriptor = driver.export_descriptor(handle)
                transfer.callback(os.close, descriptor)
                inbox = transfer.enter_context(_inbox(job, group.rank, seconds))
                return driver, address, descriptor, inbox

            driver, address, descriptor, inbox = agreed(group, own, self.way)
            bases = [address] * group.size

            def peers() -> None:
                for rank, got in _swap(job, group, inbox, descriptor, seconds, transfer):
                    handle = driver.import_descriptor(got)
                    self._of_peers.callback(driver.release, handle)
                    bases[rank] = self._map(driver, handle, nbytes, device.index or 0, self._of_peers)

            agreed(group, peers, self.way)
            self.bases, self.bytes = tuple(bases), _tensor(address, nbytes, device)

    @staticmethod
    def _map(driver: Driver, handle: int, nbytes: int, device: int, undone: ExitStack) -> int:
        address = driver.reserve(nbytes)
        undone.callback(driver.free_addresses, address, nbytes)
        driver.map(address, nbytes, handle)
        undone.callback(driver.unmap, address, nbytes)
        driver.allow(address, nbytes, device)
        return address


class HostMapping:
    """A mapping of host memory by an MPI window, for Triton's interpreter; collective."""

    way = "an MPI window of host memory"

    def __init__(self, group: Any, nbytes: int, device: torch.device) -> None:
        from mpi4py import MPI

        comm = MPI.COMM_SELF if group.size == 1 else group.mpi_comm
        self._window = MPI.Win.Allocate_shared(nbytes, 1, comm=comm)
        buffers = [self._window.Shared_query(r)[0] for r in range(group.size)]
        self.bases = tuple(b.address for b in buffers)
        self.bytes = torch.frombuffer(buffers[group.rank], dtype=torch.uint8)

    def close_peers(self) -> None:
        return None

    def close_own(self) -> None:
        self._window.Free()


def _attempt(mapping: Mapping, group: Communicator, opening: Callable[[], None]) -> None:
    """Run ``opening``; where it failed on every rank alike, give back what it had opened."""
    try:
        opening()
    except AgreedError:
        mapping.close_peers()
        group.barrier()  # nobody maps any more
        mapping.close_own()
        raise


def _name(job: str, rank: int) -> str:
    return f"\0xpar-{job}-{rank}"


def _inbox(job: str, rank: int, seconds: float) -> socket.socket:
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    inbox.settimeout(seconds)
    inbox.bind(_name(job, rank))
    return inbox


def _swap(
    job: str, group: Communicator, inbox: socket.socket, descriptor: int, seconds: float, transfer: ExitStack
) -> list[tuple[int, int]]:
    """Send ``descriptor`` to every peer and return (rank, descriptor) of each.

    One is received after each that is sent: a socket keeps about ten messages that nobody has taken.
    """
    found = []
    for n in range(1, group.size):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(seconds)
            out.connect(_name(job, (group.rank + n) % group.size))
            socket.send_fds(out, [str(group.rank).encode()], [descriptor])
        text, descriptors, _, _ = socket.recv_fds(inbox, 16, 1)
        if not descriptors:
            raise OSError(f"rank {text.decode()} sent no file descriptor")
        transfer.callback(os.close, descriptors[0])
        found.append((int(text), descriptors[0]))
    return found
