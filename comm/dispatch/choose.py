"""The choice of a dispatcher, from facts that every rank of the group shares."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall import AllToAllDispatcher
from xpar.comm.dispatch.alltoall_early import EarlyAllToAllDispatcher
from xpar.comm.dispatch.base import Dispatcher, DispatchRequest
from xpar.comm.dispatch.hierarchical import HierarchicalDispatcher
from xpar.comm.dispatch.nccl_ep import NcclEpDispatcher
from xpar.comm.dispatch.one_sided import OneSidedDispatcher
from xpar.comm.dispatch.replicated import ReplicatedDispatcher
from xpar.comm.dispatch.shared_memory import SharedMemoryDispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.kernels.choice import Choice, choose

DISPATCHERS: tuple[type[Dispatcher], ...] = (
    ReplicatedDispatcher,
    OneSidedDispatcher,
    NcclEpDispatcher,
    SharedMemoryDispatcher,
    HierarchicalDispatcher,
    AllGatherDispatcher,
    AllToAllDispatcher,
)
"""All dispatchers, in the order in which ``auto`` takes the first that suits."""
ON_GPUS: Mapping[type[Dispatcher], type[Dispatcher]] = {AllToAllDispatcher: EarlyAllToAllDispatcher}
"""The dispatchers that have another implementation for tokens on GPUs."""


@dataclass(frozen=True)
class DispatcherChoice(Choice[Dispatcher]):
    """A dispatcher that is ready for use, with the reasons against the others."""

    @property
    def dispatcher(self) -> Dispatcher:
        """The chosen dispatcher."""
        return self.chosen


def choose_dispatcher_class(
    grid: ProcessGrid, placement: Placement, name: str = "auto", request: DispatchRequest | None = None
) -> Choice[type[Dispatcher]]:
    """Choose as :func:`choose_dispatcher`, and build nothing."""
    wanted = request or DispatchRequest()
    return choose(
        DISPATCHERS,
        lambda cls: cls.impossible(grid, placement, wanted),
        lambda cls: cls.unsuitable(grid, placement, wanted),
        name,
        option="dispatcher",
    )


def choose_dispatcher(
    grid: ProcessGrid,
    placement: Placement,
    name: str = "auto",
    *,
    top_k: int = 2,
    sequence_parallel: bool = False,
    hidden_size: int | None = None,
    dtype: torch.dtype | None = None,
    coded_rows: bool = False,
) -> DispatcherChoice:
    """Choose and build the first dispatcher that suits ``grid``, or that of ``name``.

    Makes no collective call. Raises ValueError, with the reason and the names of those that can, if there is
    no dispatcher called ``name`` or it cannot work here. The keywords are the fields of
    :class:`DispatchRequest`.
    """
    request = DispatchRequest(top_k, sequence_parallel, hidden_size, dtype, coded_rows)
    choice = choose_dispatcher_class(grid, placement, name, request)
    cls = ON_GPUS.get(choice.chosen, choice.chosen) if grid.device.type == "cuda" else choice.chosen
    dispatcher = cls.build(grid, placement.to(grid.device))
    dispatcher.agreed = grid.agreed
    return DispatcherChoice(dispatcher, choice.rejected, choice.reason)
