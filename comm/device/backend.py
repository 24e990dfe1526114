"""The contract of a backend, which moves rows of device tensors within one group."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xpar.comm.communicator import Pending


class DeviceBackend(Protocol):
    """Moves rows of contiguous tensors on one device.

    Sizes are agreed and checked before. The result of a call is ordered after the work on torch's
    current stream, and later work on that stream may read it.
    """

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Gather the ``counts[r]`` rows of every rank r in rank order: [sum(counts), ...]."""

    def all_to_all(
        self,
        x: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        out: Tensor,
        skip: int | None = None,
        uniform: bool = False,
    ) -> Pending[Tensor]:
        """Start to exchange rows; as :meth:`~xpar.comm.communicator.Communicator.all_to_all_v`.

        ``uniform``: every pair of ranks exchanges equally many rows, and every rank knows so.
        """

    def close(self) -> None:
        """Free the connection; collective."""


def current_stream(device: torch.device) -> int:
    """Return the handle of torch's current stream on ``device``; 0 for host memory."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


class Markers:
    """Tests of how far the work on a device's streams has got; their events are used again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: deque[torch.cuda.Event] = deque()

    def record(self) -> Callable[[], bool] | None:
        """Return a test of the current stream's work so far; None while the stream is being captured.

        Once the test has been true, it must not be called again.
        """
        if self.device.type != "cuda":
            return _always
        if torch.cuda.is_current_stream_capturing():
            return None
        event = self._free.pop() if self._free else torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))

        def done() -> bool:
            if not event.query():  # type: ignore[no-untyped-call]
                return False
            self._free.append(event)
            return True

        return done


def _always() -> bool:
    return True


def synchronize(device: torch.device) -> None:
    """Wait for the work on the current stream of ``device``."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
