"""A group's collectives on device tensors.

Host tensors and all metadata go over the group's MPI communicator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xpar.comm.base_communicator import BaseCommunicator, receive_buffer
from xpar.comm.communicator import Communicator, Header, Pending, Tag
from xpar.comm.device.backend import DeviceBackend
from xpar.comm.mpi_communicator import MpiCommunicator
from xpar.comm.watchdog.collective_check import CollectiveSignature


class DeviceCommunicator(BaseCommunicator):
    """A communicator that moves device tensors with ``backend`` and host tensors with MPI.

    Args:
        host: The MPI communicator of the group.
        device: The device whose tensors ``backend`` moves.
        backend: Moves rows of device tensors within the group.
        wrap: Makes the device communicator of a sub-group from its MPI communicator; collective.
    """

    def __init__(
        self,
        host: MpiCommunicator,
        device: torch.device,
        backend: DeviceBackend,
        wrap: Callable[[Communicator], Communicator],
    ) -> None:
        self.host, self.device, self.backend, self._wrap = host, device, backend, wrap
        self.name, self.rank, self.size, self.world_ranks = host.name, host.rank, host.size, host.world_ranks

    # -- data plane -----------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.host.all_reduce(x) if self._is_on_host(x) else super().all_reduce(x)

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        return self.host.all_gather_v(x, counts) if self._is_on_host(x) else super().all_gather_v(x, counts)

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int], planned: bool = False) -> Tensor:
        if self._is_on_host(x):
            return self.host.reduce_scatter_v(x, counts, planned)
        return super().reduce_scatter_v(x, counts, planned)

    def all_to_all_v(
        self,
        x: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        out: Tensor | None = None,
        skip: int | None = None,
    ) -> Pending[Tensor]:
        if self._is_on_host(x):
            return self.host.all_to_all_v(x, send_counts, recv_counts, out, skip)
        x = self._ready(x)
        out = receive_buffer(x, send_counts, recv_counts, out, self.size)
        self._check_exchange(x, send_counts, recv_counts, skip)
        return self.backend.all_to_all(x, send_counts, recv_counts, out, skip)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        if self._is_on_host(x):
            return self.host.broadcast(x, root)
        sent = self._ready(x)
        self._agree_root(sent, root)
        rows = sent.reshape(1, -1)
        counts = [int(r == root) for r in range(self.size)]
        received = self._gather(rows if self.rank == root else rows[:0], counts)
        return x if self.rank == root else x.copy_(received.view(x.shape))

    def split(self, color: int, key: int, name: str) -> Communicator:
        return self._wrap(self.host.split(color, key, name))

    # -- metadata plane -------------------------------------------------------------------------------------

    def barrier(self, patient: bool = False) -> None:
        self.host.barrier(patient)

    def exchange(self, header: Header, tag: Tag | None = None) -> Header:
        return self.host.exchange(header, tag)

    def enter_step(self, tag: Tag) -> None:
        self.host.enter_step(tag)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.host.all_gather_object(value)

    def abort(self, code: int) -> None:
        self.host.abort(code)

    def close(self) -> None:
        """Close the MPI communicator; the transport closes the backends of all groups at once."""
        self.host.close()

    # -- the two movements ----------------------------------------------------------------------------------

    def check_collective(self, signature: CollectiveSignature) -> None:
        self.host.check_collective(signature)

    def checks_collectives(self) -> bool:
        return self.host.checks_collectives()

    def _is_on_host(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and self.device.type != "cpu"

    def _ready(self, x: Tensor) -> Tensor:
        if x.device != self.device:
            raise ValueError(
                f"a tensor on {x.device} in group {self.name}, which moves those of {self.device}; "
                "copy it there first"
            )
        return x.contiguous()

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self.backend.all_gather(x, counts)

    def _swap(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        own = counts[self.rank]
        out = x.new_empty((self.size * own, *x.shape[1:]))
        is_uniform = len(set(counts)) == 1
        return self.backend.all_to_all(x, counts, [own] * self.size, out, uniform=is_uniform).wait()
