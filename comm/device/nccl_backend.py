"""A backend that moves rows of device tensors with NCCL."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.device.backend import Markers, current_stream, synchronize
from xpar.comm.device.nccl_communicator import NcclCommunicator, call_in_time, os_error_from
from xpar.comm.device.nccl_library import ALL_TO_ALL_VERSION, NcclError
from xpar.comm.device.schedule import Schedule, exchange_schedule, gather_schedule
from xpar.comm.failure import agreed


class NcclBackend:
    """Implements :class:`~xpar.comm.device.backend.DeviceBackend` with NCCL.

    Everything runs on torch's current stream, and no call waits for the GPU. Equal sizes go through
    NCCL's own all-gather and all-to-all, others through one group of sends and receives.
    """

    def __init__(self, nccl: NcclCommunicator, device: torch.device) -> None:
        self.nccl, self.device = nccl, device
        self._markers = Markers(device)
        self._has_all_to_all = nccl.library.version() >= ALL_TO_ALL_VERSION

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        if not out.numel():
            return out
        if len(set(counts)) > 1:
            self._move("all_gather_v", gather_schedule(self.nccl.rank, counts), x, out)
        else:
            nbytes = x.numel() * x.element_size()
            self._run(f"all_gather of {nbytes} B", self.nccl.library.all_gather, x, out, nbytes)
        return out

    def all_to_all(
        self,
        x: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        out: Tensor,
        skip: int | None = None,
        uniform: bool = False,
    ) -> Pending[Tensor]:
        if uniform and skip is None and self._has_all_to_all:
            if x.numel():
                each = x.numel() * x.element_size() // len(send)
                self._run(f"all_to_all of {each} B a pair", self.nccl.library.all_to_all, x, out, each)
        else:
            self._move("all_to_all_v", exchange_schedule(self.nccl.rank, send, recv, skip), x, out)
        return Pending(lambda: _keep_until(x, out))

    def check(self, group: Communicator) -> None:
        """Exchange one row between every pair of ranks and compare; AgreedError on all if wrong.

        Where NCCL's calls block, another thread makes them.
        """

        def exchange() -> None:
            size, rank = self.nccl.size, self.nccl.rank
            rows = torch.arange(size, device=self.device) + rank * size
            ones = [1] * size
            received = self.all_to_all(rows, ones, ones, torch.empty_like(rows)).wait()
            self.finish("the test exchange", self.nccl.deadlines.connect)
            expected = [source * size + rank for source in range(size)]
            if received.tolist() != expected:
                raise NcclError(f"the test exchange brought {received.tolist()} instead of {expected}")

        def attempt() -> None:
            if not self.nccl.blocking:
                return exchange()
            call_in_time(exchange, self.nccl.deadlines.connect, "the test exchange", self.device)

        self.nccl.on_trial = True
        try:
            agreed(group, lambda: os_error_from(attempt), f"NCCL for group {group.name}")
        except RuntimeError:
            self.nccl.break_off("the test exchange failed")
            raise
        self.nccl.on_trial = False

    def finish(self, what: str, seconds: float) -> None:
        """Wait for the work ``what`` on the current stream; NcclError after ``seconds``."""
        done = self._markers.record()
        if done is not None and not self.nccl.watch.wait(done, seconds, self.nccl.problem):
            reason = f"{what}: not done on the GPU after {seconds:g} s; a rank of the group did not take part"
            self.nccl.break_off(reason)
            raise NcclError(reason)
        synchronize(self.device)

    def close(self) -> None:
        self.nccl.close()

    def _move(self, what: str, schedule: Schedule, x: Tensor, out: Tensor) -> None:
        if schedule.copy is not None:
            source, target, rows = schedule.copy
            out[target : target + rows].copy_(x[source : source + rows])
        row = int(np.prod(x.shape[1:])) * x.element_size()
        if not row or not (schedule.sends or schedule.recvs):
            return
        library, comm, stream = self.nccl.library, self.nccl.comm, current_stream(self.device)
        from_, into = x.data_ptr(), out.data_ptr()

        def calls() -> None:
            for s in schedule.sends:
                library.send(from_ + s.first * row, s.rows * row, s.peer, comm, stream)
            for r in schedule.recvs:
                library.recv(into + r.first * row, r.rows * row, r.peer, comm, stream)

        sent, received = (sum(t.rows for t in side) for side in (schedule.sends, schedule.recvs))
        self.nccl.run(f"{what} ({sent} rows of {row} B out, {received} in)", calls, self._markers.record)

    def _run(self, what: str, call: Callable[..., None], x: Tensor, out: Tensor, nbytes: int) -> None:
        comm, stream = self.nccl.comm, current_stream(self.device)
        self.nccl.run(
            what,
            lambda: call(x.data_ptr(), out.data_ptr(), nbytes, comm, stream),
            self._markers.record,
            grouped=False,
        )


def _keep_until(x: Tensor, out: Tensor) -> Tensor:
    """Return ``out``, and keep ``x`` alive until then, after which its memory may be reused."""
    del x
    return out
