"""The contract of a transport: how rows of device tensors get from rank to rank of one group."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xpar.comm.communicator import Pending


class DeviceBackend(Protocol):
    """Moves rows of contiguous tensors on one device. Sizes are agreed and checked before they come here.

    What a call returns is ordered after the work on torch's current stream, and later work there may read it.
    """

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """[sum(counts), ...]: rows of all ranks in rank order."""

    def all_to_all(
        self,
        x: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        out: Tensor,
        skip: int | None = None,
        uniform: bool = False,
    ) -> Pending[Tensor]:
        """See :meth:`~xpar.comm.communicator.Communicator.all_to_all_v`.

        ``uniform``: every pair of ranks exchanges the same number of rows, and every rank knows it.
        """

    def close(self) -> None:
        """Give back what the mover holds; collective."""


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on ``device``; 0, the only one there is, for host memory."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def marker(device: torch.device) -> Callable[[], bool] | None:
    """A question that is answered yes once the work now on the current stream is done; None while it is captured."""
    if device.type != "cuda":
        return lambda: True
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.current_stream(device).record_event()
    return lambda: bool(event.query())


def synchronize(device: torch.device) -> None:
    """Wait for the work on the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
