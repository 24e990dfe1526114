"""A group's collectives on device tensors; what lies on the host, and all metadata, goes over the group's MPI."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xpar.comm.base_communicator import BaseCommunicator, arrival_buffer
from xpar.comm.communicator import Communicator, Header, Pending
from xpar.comm.device.backend import DeviceBackend
from xpar.comm.handshake import Tag
from xpar.comm.mpi_communicator import MpiCommunicator
from xpar.comm.watchdog.collective_check import CollectiveSignature

if TYPE_CHECKING:
    from xpar.comm.device.transport import Transport


class DeviceCommunicator(BaseCommunicator):
    """Tensors on ``device`` travel through ``mover``, host tensors and records over ``host``.

    ``transport`` made this communicator and makes those of its sub-groups.
    """

    def __init__(
        self, host: MpiCommunicator, device: torch.device, mover: DeviceBackend, transport: "Transport"
    ) -> None:
        self.host, self.device, self.mover, self.transport = host, device, mover, transport
        self.name, self.rank, self.size, self.world_ranks = host.name, host.rank, host.size, host.world_ranks

    # -- data plane -----------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.host.all_reduce(x) if self._on_host(x) else super().all_reduce(x)

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        return self.host.all_gather_v(x, counts) if self._on_host(x) else super().all_gather_v(x, counts)

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if self._on_host(x):
            return self.host.reduce_scatter_v(x, counts)
        return super().reduce_scatter_v(x, counts)

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        if self._on_host(x):
            return self.host.all_to_all_v(x, send_counts, recv_counts, out, skip)
        x = self._ready(x)
        out = arrival_buffer(x, send_counts, recv_counts, out, self.size)
        self._compare_exchange(x, send_counts, recv_counts, skip)
        return self.mover.all_to_all(x, send_counts, recv_counts, out, skip)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        if self._on_host(x):
            return self.host.broadcast(x, root)
        sent = self._ready(x)
        self._agree_root(sent, root)
        rows = sent.reshape(1, -1)
        counts = [int(r == root) for r in range(self.size)]
        got = self._gather(rows if self.rank == root else rows[:0], counts)
        return x if self.rank == root else x.copy_(got.view(x.shape))

    def split(self, color: int, key: int, name: str) -> Communicator:
        return self.transport.wrap(self.host.split(color, key, name))

    # -- metadata plane -------------------------------------------------------------------------------------

    def barrier(self, patient: bool = False) -> None:
        self.host.barrier(patient)

    def exchange(self, record: Header, tag: Tag | None = None) -> Header:
        return self.host.exchange(record, tag)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.host.all_gather_object(value)

    def abort(self, code: int) -> None:
        self.host.abort(code)

    def close(self) -> None:
        """What moves device tensors is closed by the transport, for all its groups at once."""
        self.host.close()

    # -- the two movements ----------------------------------------------------------------------------------

    def _compare(self, intent: CollectiveSignature) -> None:
        self.host._compare(intent)

    def _compares(self) -> bool:
        return self.host._compares()

    def _on_host(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and self.device.type != "cpu"

    def _ready(self, x: Tensor) -> Tensor:
        if x.device != self.device:
            raise ValueError(
                f"a tensor on {x.device} in group {self.name}, which moves those of {self.device}; copy it there first"
            )
        return x.contiguous()

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self.mover.all_gather(x, counts)

    def _swap(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        mine = counts[self.rank]
        out = x.new_empty((self.size * mine, *x.shape[1:]))
        uniform = len(set(counts)) == 1
        return self.mover.all_to_all(x, counts, [mine] * self.size, out, uniform=uniform).wait()
