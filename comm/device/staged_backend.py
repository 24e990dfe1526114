"""A backend that moves rows of device tensors with MPI through pinned host memory.

It serves GPUs without a usable NCCL and several ranks on one GPU. It is slower, and needs only MPI.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.device.backend import synchronize
from xpar.comm.device.schedule import starts
from xpar.comm.mpi_communicator import MpiCommunicator


class StagedBackend:
    """Implements :class:`~xpar.comm.device.backend.DeviceBackend` with MPI on host memory.

    Each call waits for the GPU's work on the rows that it sends. Buffers come from torch's cache of
    pinned memory, which keeps a buffer until the copies that use it are done.
    """

    def __init__(self, host: MpiCommunicator, device: torch.device) -> None:
        self.host, self.device = host, device

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        gathered = self.host.gather_into(self._copy_to_host(x), counts, self._host_buffer(x, sum(counts)))
        return torch.empty_like(gathered, device=self.device).copy_(gathered, non_blocking=True)

    def all_to_all(
        self,
        x: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        out: Tensor,
        skip: int | None = None,
        uniform: bool = False,
    ) -> Pending[Tensor]:
        arriving = [0 if r == skip else n for r, n in enumerate(recv)]
        sent, rows = self._copy_to_host(x), self._host_buffer(x, sum(arriving))
        pending = self.host.exchange_into(sent, send, arriving, rows, skip)
        return Pending(lambda: _copy_around(pending.wait(), out, recv, skip))

    def close(self) -> None:
        return None

    def _copy_to_host(self, x: Tensor) -> Tensor:
        rows = self._host_buffer(x, x.shape[0]).copy_(x, non_blocking=True)
        synchronize(self.device)
        return rows

    def _host_buffer(self, like: Tensor, rows: int) -> Tensor:
        pin = self.device.type == "cuda"
        return torch.empty((rows, *like.shape[1:]), dtype=like.dtype, device="cpu", pin_memory=pin)


def _copy_around(rows: Tensor, out: Tensor, recv: Sequence[int], skip: int | None) -> Tensor:
    """Copy received ``rows`` to ``out``, stepping over the place of source ``skip``."""
    if skip is None:
        return out.copy_(rows, non_blocking=True)
    before, after = starts(recv)[skip], starts(recv)[skip] + recv[skip]
    out[:before].copy_(rows[:before], non_blocking=True)
    out[after:].copy_(rows[before:], non_blocking=True)
    return out
