"""A backend for MPI libraries that reach GPU memory: rows are handed to MPI as they are.

A library that does not reach GPU memory crashes on a device address. Nothing can catch that, and no
child process can try it out (a child is not part of the MPI job). So ``auto`` never chooses this
transport. Asked for by name, it is refused unless the library itself claims on every rank that it
reaches CUDA memory, and then its first exchange is checked.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.device.backend import synchronize
from xpar.comm.failure import agreed
from xpar.comm.mpi_communicator import MpiCommunicator

CUDA = 0
"""``MPIX_GPU_SUPPORT_CUDA``."""


class MpiBackend:
    """Implements :class:`~xpar.comm.device.backend.DeviceBackend` with MPI on device addresses.

    MPI knows no streams: each call waits for the GPU before it starts.
    """

    def __init__(self, host: MpiCommunicator, device: torch.device) -> None:
        self.host, self.device = host, device

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        synchronize(self.device)
        return self.host.gather_into(x, counts, out)

    def all_to_all(
        self,
        x: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        out: Tensor,
        skip: int | None = None,
        uniform: bool = False,
    ) -> Pending[Tensor]:
        synchronize(self.device)
        return self.host.exchange_into(x, send, recv, out, skip)

    def check(self) -> None:
        """Exchange one row between every pair of ranks and compare; AgreedError on all if wrong."""
        size, rank = self.host.size, self.host.rank
        rows = torch.arange(size, device=self.device) + rank * size
        ones = [1] * size
        received = self.all_to_all(rows, ones, ones, torch.zeros_like(rows)).wait().tolist()
        expected = [source * size + rank for source in range(size)]

        def compare() -> None:
            if received != expected:
                raise OSError(f"MPI claims to reach GPU memory but brought {received} instead of {expected}")

        agreed(self.host, compare, "direct MPI on device memory")

    def close(self) -> None:
        return None


def claims_cuda() -> bool:
    """Return whether the MPI library claims to take CUDA addresses; no such memory is touched.

    It reads the info key of MPI 4.1 and calls the functions of Open MPI, and of MPICH and its
    descendants.
    """
    from mpi4py import MPI

    info = MPI.COMM_SELF.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    if any(kind.strip().startswith("cuda") for kind in kinds.split(",")):
        return True
    return any(_claims_support(ctypes.CDLL(path)) for path in find_mpi_libraries())


def _claims_support(library: ctypes.CDLL) -> bool:
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    if hasattr(library, "MPIX_GPU_query_support"):
        supported = ctypes.c_int(0)
        failed = library.MPIX_GPU_query_support(ctypes.c_int(CUDA), ctypes.byref(supported))
        return not failed and bool(supported.value)
    return False


def find_mpi_libraries() -> list[str]:
    """Return the paths of the MPI libraries that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(p for p in paths if Path(p).name.startswith(("libmpi.so", "libmpich.so", "libmpi_cray")))
