"""Both ways of mapping peers' memory, with the driver's calls made on memory files of Linux: sockets and
order are real."""

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest
import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device import mappings
from xpar.comm.device.cuda_driver import Driver, DriverError
from xpar.comm.device.mappings import DescriptorMapping, HostMapping, IpcMapping
from xpar.comm.device.peer_memory import PeerMemory
from xpar.comm.device.trial import try_exchange
from xpar.comm.failure import AgreedError
from xpar.comm.watchdog.deadlines import Deadlines

pytestmark = pytest.mark.mpi(deadline=120)
HOST = torch.device("cpu")
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
SHARED, FIXED, PRIVATE, ANONYMOUS = 0x01, 0x10, 0x02, 0x20
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class MemoryFiles:
    """What :class:`Driver` does, on memory files. ``fail``: the call that raises."""

    fail = ""

    def __init__(self) -> None:
        self.files: dict[int, tuple[int, int]] = {}

    def granularity(self, device: int) -> int:
        return 4096

    def create(self, nbytes: int, device: int) -> int:
        handle = os.memfd_create("window")
        os.ftruncate(handle, nbytes)
        return handle

    def export_descriptor(self, handle: int) -> int:
        return os.dup(handle)

    def import_descriptor(self, descriptor: int) -> int:
        self._perhaps_fail("import")
        return os.dup(descriptor)

    def release(self, handle: int) -> None:
        os.close(handle)

    def reserve(self, nbytes: int) -> int:
        return int(libc.mmap(None, nbytes, 0, PRIVATE | ANONYMOUS, -1, 0))

    def map(self, address: int, nbytes: int, handle: int) -> None:
        assert libc.mmap(address, nbytes, READ_WRITE, SHARED | FIXED, handle, 0) == address

    def allow(self, address: int, nbytes: int, device: int) -> None:
        return None

    def unmap(self, address: int, nbytes: int) -> None:
        libc.munmap(address, nbytes)

    def free_addresses(self, address: int, nbytes: int) -> None:
        return None

    def allocate(self, nbytes: int) -> int:
        return self._at(self.create(nbytes, 0), nbytes)

    def free(self, address: int) -> None:
        handle, nbytes = self.files.pop(address)
        self.unmap(address, nbytes)
        os.close(handle)

    def export_ipc(self, address: int) -> bytes:
        return f"{os.getpid()} {self.files[address][0]} {self.files[address][1]}".encode()

    def open_ipc(self, handle: bytes) -> int:
        self._perhaps_fail("open")
        pid, descriptor, nbytes = map(int, handle.decode().split())
        return self._at(os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR), nbytes)

    close_ipc = free

    def _at(self, handle: int, nbytes: int) -> int:
        address = self.reserve(nbytes)
        self.map(address, nbytes, handle)
        self.files[address] = handle, nbytes
        return address

    def _perhaps_fail(self, call: str) -> None:
        if self.fail == call:
            raise DriverError(f"planted in {call}")


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every descriptor and every mapping of a memory file is given back, whatever happened."""
    monkeypatch.setattr(mappings, "Driver", MemoryFiles)
    monkeypatch.setattr(mappings, "_tensor", bytes_at)
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with open("/proc/self/maps") as maps:
        assert "memfd:window" not in maps.read()


@pytest.mark.parametrize("way", [IpcMapping, DescriptorMapping])
def test_an_exchange_through_memory_of_other_processes(group: Communicator, way: type) -> None:
    limits = Deadlines(connect=30)
    memory = PeerMemory.open(group, 3 << 20, HOST, ways=(way,), trial=lambda m: try_exchange(m, limits))
    assert memory.access.way == way.way and memory.bytes.numel() == 4 << 20  # type: ignore[attr-defined]
    assert len(set(memory.bases)) == group.size
    memory.close()


@pytest.mark.mpi(min_size=2, deadline=120)
@pytest.mark.parametrize(("way", "call"), [(IpcMapping, "open"), (DescriptorMapping, "import")])
def test_what_fails_on_one_rank_is_given_back_on_all(
    group: Communicator, way: type, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if group.rank == group.size - 1:
        monkeypatch.setattr(MemoryFiles, "fail", call)
    memory = PeerMemory.open(group, 1 << 20, HOST, ways=(way, HostMapping))
    assert memory.access.way == HostMapping.way
    assert f"rank {group.world_ranks[-1]}: planted in {call}" in memory.access.explain()
    memory.close()


def test_without_a_driver_the_reason_is_one_line_a_way(
    group: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xpar.comm.device.cuda_driver.LIBRARY", "libnone.so.1")
    monkeypatch.setattr(mappings, "Driver", Driver)
    with pytest.raises(
        AgreedError, match=r"CUDA IPC handles: .*libnone.*; file descriptors .*libnone"
    ) as caught:
        PeerMemory.open(group, 1 << 20, HOST, ways=(IpcMapping, DescriptorMapping))
    assert len(str(caught.value).splitlines()) == 1
