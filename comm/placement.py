"""Which ranks of the ``moe`` group hold which expert."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xpar.comm.partition import split_range, split_sizes


@dataclass(frozen=True)
class Placement:
    """Contiguous blocks of experts over ``ep`` ranks, each block held (sliced) by ``etp`` consecutive ranks.

    ``owner``: [E + 1] int64, the ep rank of each expert. ``local``: [E + 1] int32, its index there. The last
    entry, which id -1 reaches, is ``ep`` and -1: a dropped slot has no owner. Experts that each rank holds copies of
    have an id for each copy, from E on, in place of the last entry: see :meth:`blocks`. ``partial``: some experts have no
    owner either, see :meth:`within`.
    """

    num_experts: int
    ep: int
    etp: int
    owner: Tensor
    local: Tensor
    partial: bool = False

    @classmethod
    def blocks(cls, num_experts: int, ep: int, etp: int = 1, copies: int = 0) -> "Placement":
        """E need not divide by ``ep``, nor reach it: the first ranks hold one expert more, the last may hold none.

        ``copies``: experts that every ep rank holds besides its block; those of rank r have the ids
        ``E + r * copies`` and on, and the local indices after its block's.
        """
        sizes = split_sizes(num_experts, ep)
        owner = torch.repeat_interleave(torch.arange(ep), torch.tensor(sizes))
        local = torch.cat([torch.arange(n) for n in sizes] + [torch.arange(n, n + copies) for n in sizes])
        owner = torch.cat([owner, torch.arange(ep).repeat_interleave(copies), torch.tensor([ep])])
        return cls(num_experts, ep, etp, owner, torch.cat([local, torch.tensor([-1])]).to(torch.int32))

    def to(self, device: torch.device) -> "Placement":
        """The same placement with its tables on ``device``, where the routing that it is asked about lies."""
        return replace(self, owner=self.owner.to(device), local=self.local.to(device))

    def within(self, ep_ranks: range) -> "Placement":
        """The same seen from ``ep_ranks`` alone, counted from 0: a slot of another rank's expert is dropped."""
        here = (self.owner >= ep_ranks.start) & (self.owner < ep_ranks.stop)
        owner = torch.where(here, self.owner - ep_ranks.start, len(ep_ranks))
        local = torch.where(here, self.local, -1)
        return replace(self, ep=len(ep_ranks), owner=owner, local=local, partial=True)

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self.owner.device

    def experts_of(self, ep_rank: int) -> range:
        """Global ids of the experts held by ``ep_rank``, in local order."""
        held = split_range(self.num_experts, self.ep, ep_rank)
        return range(held.start, held.stop)

    def owners(self, topk_ids: Tensor) -> Tensor:
        """[T, k] int64: the ep rank of each slot, ``ep`` for a dropped one."""
        return self.owner[topk_ids.long()]

    def local_ids(self, topk_ids: Tensor, ep_rank: int) -> Tensor:
        """[T, k] int32: the local index of each slot's expert on ``ep_rank``, -1 where it is not there."""
        if self.ep == 1 and not self.partial:
            return topk_ids.to(torch.int32)
        ids = topk_ids.long()
        return torch.where(self.owner[ids] == ep_rank, self.local[ids], -1)

    def slot_order(self, topk_ids: Tensor) -> tuple[Tensor, list[int]]:
        """Where each slot's output lies when the ep ranks' slot outputs are laid end to end; and each rank's number.

        [T, k] int64, -1 for a dropped slot. Every rank computes its slots in (token, slot) order.
        """
        owners = self.owners(topk_ids).reshape(-1)
        counts = torch.bincount(owners, minlength=self.ep + 1)[: self.ep].tolist()
        order = torch.sort(owners, stable=True).indices
        positions = torch.empty_like(order)
        positions[order] = torch.arange(order.numel(), device=order.device)
        positions.masked_fill_(owners == self.ep, -1)
        return positions.view(topk_ids.shape), counts
