"""The window through which all layers of a group exchange rows, and reports of its failures."""

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device.peer_memory import GPU_WAYS, PeerAccess, PeerMemory, find_access
from xpar.comm.device.trial import describe, waiting_limit
from xpar.comm.device.watch import Watch
from xpar.comm.handshake import CollectiveError
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import Watchdog

if TYPE_CHECKING:
    from xpar.kernels.gpu.one_sided import Exchange, Peers, Step

LEAST_BYTES = 1 << 20
"""The least bytes of a window's two parts (rows to experts, results); it then grows by half at least."""
KEPT = 64
"""Exchanges of different sizes that are kept ready."""


@dataclass
class _Opened:
    """An open window and its sizes.

    ``is_recorded``: a CUDA graph holds its addresses, so it must stay. ``side``: a stream for giving up.
    """

    memory: PeerMemory
    peers: "Peers"
    front: int
    back: int
    is_recorded: bool = False
    side: "torch.cuda.Stream | None" = None


class PeerWindow:
    """A window in the memory of all ranks of ``group``, through which their layers exchange.

    It is opened at the first exchange, and opened anew where a step needs a larger one. Every rank asks for
    the same steps in the same order, on one stream. A graph that was recorded keeps the window that it was
    recorded with: that one is then no longer used by launched steps if they outgrow it, and lives until
    ``close``.

    Args:
        group: ranks of one node.
        device: this rank's GPU; "cpu" for Triton's interpreter.
        deadlines: ``finish`` is how long a kernel waits for its peers.
        access: what :func:`find_access` found, or None: ask.
    """

    def __init__(
        self,
        group: Communicator,
        device: torch.device,
        deadlines: Deadlines,
        access: PeerAccess | None = None,
    ) -> None:
        self.group, self.device, self.deadlines = group, device, deadlines
        self.access = access or find_access(group, device, deadlines)
        self._watchdog: Watchdog | None = None
        self._opened: list[_Opened] = []
        self._exchanges: OrderedDict[Step, Exchange] = OrderedDict()

    def exchange(self, step: "Step") -> "Exchange":
        """Return the exchange for ``step``; collective where the window has to grow.

        Raises AgreedError on every rank where there is no memory for it, RuntimeError while a graph is
        recorded.
        """
        from xpar.kernels.gpu.one_sided import Exchange

        if step not in self._exchanges:
            self._reserve(step.front_bytes, step.back_bytes)
            self._exchanges[step] = Exchange(self._opened[-1].peers, step)
            if len(self._exchanges) > KEPT:
                self._exchanges.popitem(last=False)
        self._exchanges.move_to_end(step)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._opened[-1].is_recorded = True
        return self._exchanges[step]

    def problem(self) -> str | None:
        """Return who was missing when a kernel gave up, or None; looks at host memory alone."""
        for opened in self._opened:
            status = opened.memory.status.tolist()
            if status[0]:
                what = describe(status, self.group.world_ranks, self.deadlines.finish)
                return f"one-sided exchange of group {self.group.name}: {what}"
        return None

    def report_to(self, watch: Watch | None, watchdog: Watchdog | None) -> None:
        """Have a late peer reported, by ``watch``, and the peers' waiting ended when this rank fails."""
        if watch is not None:
            watch.always(self.problem)
        if watchdog is not None:
            self._watchdog = watchdog
            watchdog.before_end(self.abort)

    def check(self) -> None:
        """Raise CollectiveError if an exchange is broken: its windows cannot be used again."""
        problem = self.problem()
        if problem is not None:
            raise CollectiveError(problem)

    def abort(self) -> None:
        """End the waiting of all ranks' kernels; from any thread, while this GPU waits itself."""
        for opened in self._opened:
            if opened.side is None:
                opened.peers.abort()
                continue
            with suppress(RuntimeError), torch.cuda.device(self.device), torch.cuda.stream(opened.side):
                opened.peers.abort()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that this rank has given to exchanges."""
        return sum(o.memory.bytes.numel() for o in self._opened)

    def close(self) -> None:
        """Give all memory back; collective."""
        if self._watchdog is not None:
            self._watchdog.forget(self.abort)
        self._exchanges.clear()
        while self._opened:
            self._opened.pop().memory.close()

    def _side_stream(self) -> "torch.cuda.Stream | None":
        """Return a stream for :meth:`abort`, whose kernel must not queue up behind those that wait."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _reserve(self, front: int, back: int) -> None:
        from xpar.kernels.gpu.one_sided import window_bytes

        now = self._opened[-1] if self._opened else None
        if now is not None and front <= now.front and back <= now.back:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a window of {front + back} bytes is needed while a graph is recorded; take a step of this "
                "size first"
            )
        front, back = (
            _rounded(n if now is None else max(n, old * 3 // 2 if n > old else old))
            for n, old in ((front, now.front if now else 0), (back, now.back if now else 0))
        )
        self._exchanges.clear()
        if now is not None and not now.is_recorded:
            self._opened.pop().memory.close()
        ways = [way for way in GPU_WAYS if getattr(way, "way", None) == self.access.way]
        memory = PeerMemory.open(self.group, window_bytes(front, back), self.device, ways=ways or None)
        peers = memory.peers(front, waiting_limit(self.deadlines.finish, self.device))
        peers.rehearse_abort()
        self._opened.append(_Opened(memory, peers, front, back, side=self._side_stream()))


def _rounded(nbytes: int) -> int:
    return -(-max(nbytes, LEAST_BYTES) // 4096) * 4096
