"""The placement of experts: the ranks of the ``moe`` group that hold each expert."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xpar.comm.partition import split_range, split_sizes


@dataclass(frozen=True)
class Placement:
    """Contiguous blocks of experts, each sliced over ``etp`` consecutive ranks.

    The last entry of both tables, which id -1 reaches, belongs to dropped slots. If every rank holds copies
    of further experts, see :meth:`blocks`, each copy has an id from E on, before that last entry.

    Attributes:
        num_experts: Number of experts E.
        ep: Number of blocks.
        etp: Number of ranks that slice one block.
        owner: [E + 1] int64, the ep rank of each expert; ``ep`` for a dropped slot.
        local: [E + 1] int32, the index of each expert on its ep rank; -1 for a dropped slot.
        is_partial: Whether some experts have no owner either, see :meth:`within`.
    """

    num_experts: int
    ep: int
    etp: int
    owner: Tensor
    local: Tensor
    is_partial: bool = False

    @classmethod
    def blocks(cls, num_experts: int, ep: int, etp: int = 1, copies: int = 0) -> "Placement":
        """Place experts in ``ep`` contiguous blocks; E need not divide by ``ep`` nor reach it.

        The first ep ranks hold one more than the last, which may hold none. ``copies``: experts that every ep
        rank holds besides its block; those of ep rank r have the ids from ``E + r * copies`` on, and the
        local indices after those of the block.
        """
        sizes = split_sizes(num_experts, ep)
        owner = torch.repeat_interleave(torch.arange(ep), torch.tensor(sizes))
        local = torch.cat([torch.arange(n) for n in sizes] + [torch.arange(n, n + copies) for n in sizes])
        owner = torch.cat([owner, torch.arange(ep).repeat_interleave(copies), torch.tensor([ep])])
        return cls(num_experts, ep, etp, owner, torch.cat([local, torch.tensor([-1])]).to(torch.int32))

    def to(self, device: torch.device) -> "Placement":
        """Return the placement with its tables on ``device``, where the routing must be."""
        return replace(self, owner=self.owner.to(device), local=self.local.to(device))

    def within(self, ep_ranks: range) -> "Placement":
        """Return the placement over ``ep_ranks``, counted from 0, with other ranks' slots dropped."""
        is_inside = (self.owner >= ep_ranks.start) & (self.owner < ep_ranks.stop)
        owner = torch.where(is_inside, self.owner - ep_ranks.start, len(ep_ranks))
        local = torch.where(is_inside, self.local, -1)
        return replace(self, ep=len(ep_ranks), owner=owner, local=local, is_partial=True)

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return self.owner.device

    def ep_rank(self, rank: int) -> int:
        """Return the ep rank of a rank of the ``moe`` group."""
        return rank // self.etp

    def experts_of(self, ep_rank: int) -> range:
        """Return the global ids of the block of ``ep_rank``, in local order."""
        block = split_range(self.num_experts, self.ep, ep_rank)
        return range(block.start, block.stop)

    def owners(self, topk_ids: Tensor) -> Tensor:
        """Return the ep rank of each slot, [T, k] int64; ``ep`` for a dropped slot."""
        return self.owner[topk_ids.long()]

    def local_ids(self, topk_ids: Tensor, ep_rank: int) -> Tensor:
        """Return each slot's local index on ``ep_rank``, [T, k] int32; -1 for experts elsewhere."""
        if self.ep == 1 and not self.is_partial:
            return topk_ids.to(torch.int32)
        ids = topk_ids.long()
        return torch.where(self.owner[ids] == ep_rank, self.local[ids], -1)

    def slot_order(self, topk_ids: Tensor) -> tuple[Tensor, list[int]]:
        """Find each slot's output among the slot outputs of all ep ranks laid end to end.

        Every rank computes its slots in (token, slot) order. Returns the positions, [T, k] int64, -1 for a
        dropped slot; and the number of slots of each ep rank.
        """
        owners = self.owners(topk_ids).reshape(-1)
        counts = torch.bincount(owners, minlength=self.ep + 1)[: self.ep].tolist()
        order = torch.sort(owners, stable=True).indices
        positions = torch.empty_like(order)
        positions[order] = torch.arange(order.numel(), device=order.device)
        positions.masked_fill_(owners == self.ep, -1)
        return positions.view(topk_ids.shape), counts
