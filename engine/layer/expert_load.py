"""How evenly a layer's tokens spread over experts and ranks, counted where a caller asks for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.dispatch.base import Traffic
from xpar.comm.placement import Placement
from xpar.kernels.contracts import Routing


@dataclass(frozen=True)
class ExpertLoad:
    """The load of a layer over ``steps`` steps of all ranks.

    Attributes:
        per_expert: (token, expert) pairs of each expert.
        per_rank: (token, expert) pairs of each expert-parallel rank.
        rows: Rows sent, as in :class:`~xpar.comm.dispatch.base.Traffic`; as are the next two.
    """

    steps: int
    per_expert: tuple[int, ...]
    per_rank: tuple[int, ...]
    rows: int
    remote_rows: int
    combined_rows: int

    @property
    def expert_imbalance(self) -> float:
        """The busiest expert's pairs over the mean: 1 is even."""
        return imbalance(self.per_expert)

    @property
    def rank_imbalance(self) -> float:
        """The busiest rank's pairs over the mean: how much longer its experts compute."""
        return imbalance(self.per_rank)


class LoadCounter:
    """Adds up this rank's part of the load; one of the :class:`Observers` of a forward.

    On a GPU the tokens of experts are counted there, and nobody waits for them before :meth:`read`.
    ``group``: the ranks that together hold every token of the job once.
    """

    def __init__(self, placement: Placement, group: Communicator) -> None:
        self.placement, self.group = placement, group
        self._slots = torch.zeros(placement.num_experts + 1, dtype=torch.int64, device=placement.device)
        self._rows = torch.zeros(3, dtype=torch.int64)
        self._steps = 0

    def add(self, routing: Routing, traffic: Traffic) -> None:
        """Count a step; steps that are captured in a CUDA graph, and their replays, are not counted."""
        if routing.topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        ids = routing.topk_ids.reshape(-1).long()
        ids = torch.where(ids < 0, self.placement.num_experts, ids)  # dropped slots count for nobody
        self._slots.scatter_add_(0, ids, torch.ones_like(ids))
        self._rows += torch.tensor([traffic.rows, traffic.remote_rows, traffic.combined_rows])
        self._steps += 1

    def read(self) -> ExpertLoad:
        """Return what all ranks counted since the start or the last reading; collective."""
        mine = torch.cat([self._slots[:-1].cpu(), self._rows])
        steps, self._steps = self._steps, 0
        self._slots.zero_()
        self._rows.zero_()
        total = self._sum(mine)
        slots = total[:-3]
        owners = self.placement.owner[: self.placement.num_experts].cpu()
        ranks = torch.zeros(self.placement.ep, dtype=torch.int64).scatter_add_(0, owners, slots)
        rows, remote, combined = (int(n) for n in total[-3:])
        return ExpertLoad(steps, tuple(slots.tolist()), tuple(ranks.tolist()), rows, remote, combined)

    def _sum(self, mine: Tensor) -> Tensor:
        return torch.from_numpy(self.group.exchange(mine.numpy()).sum(axis=0))


def imbalance(counts: Sequence[int]) -> float:
    """Return the largest count over the mean: 1 is even, and the value without any counts."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0
