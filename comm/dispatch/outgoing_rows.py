"""The rows that leave a rank, laid out before their number is known to the host.

A GPU computes the number, and the host would have to wait for it before it could size a tensor. A bound is known
without waiting: no token goes to more ranks than it has slots, nor than there are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.dispatch.base import encode_routing, goes_to
from xpar.comm.placement import Placement
from xpar.kernels.contracts import Routing
from xpar.kernels.rows import gather_rows

EARLY_BYTES = 8 << 20
"""Up to this many, packing rows that the bound counts but that do not leave costs less than waiting for the number."""


class HostCounts:
    """int64 numbers of a tensor on their way to the host."""

    def __init__(self, x: Tensor) -> None:
        self._values: list[int] | None = None
        self._event: torch.cuda.Event | None = None
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._copy.copy_(x, non_blocking=True)
        if x.is_cuda:
            self._event = torch.cuda.current_stream(x.device).record_event()

    def wait(self) -> list[int]:
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = [int(n) for n in self._copy.tolist()]
        return self._values


@dataclass(frozen=True)
class OutgoingRows:
    """``counts``: rows for each rank. ``tokens`` [B]: the token of each row, by rank and then token; ``packed`` [B, 2k]:
    its slots, as :func:`~xpar.comm.dispatch.base.encode_routing` writes them. Only the first ``sum(counts)`` of the B rows mean
    anything; the rest name token 0.
    """

    counts: HostCounts
    tokens: Tensor
    packed: Tensor

    @classmethod
    def start(cls, own: Routing, placement: Placement) -> "OutgoingRows":
        """Launch everything; the host waits for nothing."""
        by_rank = goes_to(own.topk_ids, placement)
        counts = HostCounts(by_rank.sum(1))
        pairs = first_true(by_rank.reshape(-1), row_bound(own.topk_ids, placement))
        num_tokens = max(1, own.topk_ids.shape[0])
        destination, tokens = torch.div(pairs, num_tokens, rounding_mode="floor"), pairs % num_tokens
        ids = local_ids_at_destination(own.topk_ids, destination, tokens, placement)
        return cls(counts, tokens, encode_routing(Routing(ids, own.topk_weights[tokens])))

    def pack_early(self, hidden_states: Tensor) -> Tensor | None:
        """[B, H]: the rows, packed at once; None where that would move too much for nothing."""
        if len(self.tokens) * hidden_states.shape[1] * hidden_states.element_size() > EARLY_BYTES:
            return None
        return gather_rows(hidden_states, self.tokens)


def row_bound(topk_ids: Tensor, placement: Placement) -> int:
    """The most rows that ``topk_ids`` [T, k] can send: each token once to every rank of each ep rank it reaches."""
    tokens, k = topk_ids.shape
    return tokens * min(k, placement.ep) * placement.etp


def first_true(flags: Tensor, bound: int) -> Tensor:
    """[bound] int64: the positions of the true ``flags`` in order, then zeros; there are at most ``bound`` true ones."""
    places = torch.where(flags, flags.cumsum(0) - 1, bound)
    positions = torch.zeros(bound + 1, dtype=torch.int64, device=flags.device)
    positions.scatter_(0, places, torch.arange(flags.numel(), device=flags.device))
    return positions[:bound]


def local_ids_at_destination(
    topk_ids: Tensor, destination: Tensor, tokens: Tensor, placement: Placement
) -> Tensor:
    """[S, k] int32: for each row sent, the local ids of its slots at its destination, -1 for slots elsewhere."""
    ids = topk_ids[tokens].long()
    there = placement.owner[ids] == (destination // placement.etp)[:, None]
    return torch.where(there, placement.local[ids], -1)
