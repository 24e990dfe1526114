"""Rows of device tensors moved by MPI through pinned host memory.

For GPUs without a usable NCCL and for several ranks on one GPU: slower, and needs nothing but MPI.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.device.backend import synchronize
from xpar.comm.device.schedule import starts
from xpar.comm.mpi_communicator import MpiCommunicator


class StagedBackend:
    """See :class:`~xpar.comm.device.backend.DeviceBackend`. Each call waits for the GPU's work on the rows that it sends.

    Buffers come from torch's cache of pinned memory, which keeps one until the copies that use it are done.
    """

    def __init__(self, host: MpiCommunicator, device: torch.device) -> None:
        self.host, self.device = host, device

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        gathered = self.host.gather_into(self._down(x), counts, self._pinned(x, sum(counts)))
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
        sent, rows = self._down(x), self._pinned(x, sum(arriving))
        pending = self.host.exchange_into(sent, send, arriving, rows, skip)
        return Pending(lambda: _place(pending.wait(), out, recv, skip))

    def close(self) -> None:
        return None

    def _down(self, x: Tensor) -> Tensor:
        rows = self._pinned(x, x.shape[0]).copy_(x, non_blocking=True)
        synchronize(self.device)
        return rows

    def _pinned(self, like: Tensor, rows: int) -> Tensor:
        pin = self.device.type == "cuda"
        return torch.empty((rows, *like.shape[1:]), dtype=like.dtype, device="cpu", pin_memory=pin)


def _place(rows: Tensor, out: Tensor, recv: Sequence[int], skip: int | None) -> Tensor:
    """Copy what arrived into ``out``, around the place of source ``skip``."""
    if skip is None:
        return out.copy_(rows, non_blocking=True)
    before, after = starts(recv)[skip], starts(recv)[skip] + recv[skip]
    out[:before].copy_(rows[:before], non_blocking=True)
    out[after:].copy_(rows[before:], non_blocking=True)
    return out
