"""Rows of device tensors moved by NCCL."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.device.backend import current_stream, marker, synchronize
from xpar.comm.device.nccl_communicator import NcclCommunicator, named
from xpar.comm.device.nccl_library import ALL_TO_ALL_VERSION, NcclError
from xpar.comm.device.schedule import Schedule, exchange_schedule, gather_schedule
from xpar.comm.failure import agreed


class NcclBackend:
    """See :class:`~xpar.comm.device.backend.DeviceBackend`. Everything runs on torch's current stream; no call waits for the GPU.

    Equal sizes go through NCCL's own all-gather and all-to-all, others through one group of sends and receives.
    """

    def __init__(self, link: NcclCommunicator, device: torch.device) -> None:
        self.link, self.device = link, device
        self._has_all_to_all = link.library.version() >= ALL_TO_ALL_VERSION

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        if not out.numel():
            return out
        if len(set(counts)) > 1:
            self._move("all_gather_v", gather_schedule(self.link.rank, counts), x, out)
        else:
            self._run(f"all_gather of {x.nbytes} B", self.link.library.all_gather, x, out, x.nbytes)
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
                each = x.nbytes // len(send)
                self._run(f"all_to_all of {each} B a pair", self.link.library.all_to_all, x, out, each)
        else:
            self._move("all_to_all_v", exchange_schedule(self.link.rank, send, recv, skip), x, out)
        return Pending(lambda: _kept(x, out))

    def check(self, group: Communicator) -> None:
        """One row between every pair of ranks, waited for and compared; collective, one error on every rank."""

        def attempt() -> None:
            size, rank = self.link.size, self.link.rank
            rows = torch.arange(size, device=self.device) + rank * size
            ones = [1] * size
            got = self.all_to_all(rows, ones, ones, torch.empty_like(rows)).wait()
            self.finish("the test exchange", self.link.deadlines.connect)
            expected = [source * size + rank for source in range(size)]
            if got.tolist() != expected:
                raise NcclError(f"the test exchange brought {got.tolist()} instead of {expected}")

        try:
            agreed(group, lambda: named(attempt), f"NCCL for group {group.name}")
        except RuntimeError:
            self.link.break_off("the test exchange failed")
            raise

    def finish(self, what: str, seconds: float) -> None:
        """Wait until the GPU has done what is on the current stream, at most ``seconds``; raises NcclError."""
        done = marker(self.device)
        if done is not None and not self.link.watch.wait(done, seconds, self.link.problem):
            reason = f"{what}: not done on the GPU after {seconds:g} s; a rank of the group did not take part"
            self.link.break_off(reason)
            raise NcclError(reason)
        synchronize(self.device)

    def close(self) -> None:
        self.link.close()

    def _move(self, what: str, schedule: Schedule, x: Tensor, out: Tensor) -> None:
        if schedule.copy is not None:
            source, target, rows = schedule.copy
            out[target : target + rows].copy_(x[source : source + rows])
        row = int(np.prod(x.shape[1:])) * x.element_size()
        if not row or not (schedule.sends or schedule.recvs):
            return
        library, comm, stream = self.link.library, self.link.comm, current_stream(self.device)
        from_, into = x.data_ptr(), out.data_ptr()

        def calls() -> None:
            for s in schedule.sends:
                library.send(from_ + s.first * row, s.rows * row, s.peer, comm, stream)
            for r in schedule.recvs:
                library.recv(into + r.first * row, r.rows * row, r.peer, comm, stream)

        sent, got = (sum(t.rows for t in side) for side in (schedule.sends, schedule.recvs))
        self.link.run(f"{what} ({sent} rows of {row} B out, {got} in)", calls, self._marker)

    def _run(self, what: str, call: Callable[..., None], x: Tensor, out: Tensor, nbytes: int) -> None:
        comm, stream = self.link.comm, current_stream(self.device)
        self.link.run(what, lambda: call(x.data_ptr(), out.data_ptr(), nbytes, comm, stream), self._marker)

    def _marker(self) -> Callable[[], bool] | None:
        return marker(self.device)


def _kept(x: Tensor, out: Tensor) -> Tensor:
    """``x`` is held until somebody takes ``out``; on the one stream used, its memory may be reused after that."""
    del x
    return out
