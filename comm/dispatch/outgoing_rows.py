"""The rows that leave a rank, laid out before the host knows how many there are.

A GPU computes the number of rows, and the host would have to wait for it before it could size a tensor. An
upper bound B is known without waiting: no token goes to more ranks than it has slots, nor to more than there
are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.dispatch.base import destination_mask, encode_routing
from xpar.comm.placement import Placement
from xpar.kernels.contracts import Routing
from xpar.kernels.rows import gather_rows

EARLY_BYTES = 8 << 20
"""bytes; up to this size, packing B rows of which not all leave costs less than waiting for their number"""


class HostCounts:
    """The int64 numbers of a tensor on their way to the host."""

    def __init__(self, x: Tensor) -> None:
        self._values: list[int] | None = None
        self._event: torch.cuda.Event | None = None
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._copy.copy_(x, non_blocking=True)
        if x.is_cuda:
            self._event = torch.cuda.current_stream(x.device).record_event()

    def wait(self) -> list[int]:
        """Wait for the numbers and return them."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = [int(n) for n in self._copy.tolist()]
        return self._values


@dataclass(frozen=True)
class OutgoingRows:
    """The rows that this rank sends: the first ``sum(counts)`` of B; others are copies of token 0.

    Attributes:
        counts: Rows to each rank [R].
        tokens: [B] int64, the token of each row, by destination rank and then token.
        encoded: [B, 2k] int32, ids at the destination and weights, by ``encode_routing``.
    """

    counts: HostCounts
    tokens: Tensor
    encoded: Tensor

    @classmethod
    def start(cls, routing: Routing, placement: Placement) -> "OutgoingRows":
        """Launch the work on the device; the host waits for nothing."""
        mask = destination_mask(routing.topk_ids, placement)
        counts = HostCounts(mask.sum(1))
        pairs = positions_of_true(mask.reshape(-1), max_rows(routing.topk_ids, placement))
        num_tokens = max(1, routing.topk_ids.shape[0])
        destination, tokens = torch.div(pairs, num_tokens, rounding_mode="floor"), pairs % num_tokens
        ids = local_ids_at_destination(routing.topk_ids, destination, tokens, placement)
        return cls(counts, tokens, encode_routing(Routing(ids, routing.topk_weights[tokens])))

    def pack_early(self, hidden_states: Tensor) -> Tensor | None:
        """Gather all B rows of ``hidden_states`` [T, H]; None if that would move too much."""
        if len(self.tokens) * hidden_states.shape[1] * hidden_states.element_size() > EARLY_BYTES:
            return None
        return gather_rows(hidden_states, self.tokens)


def max_rows(topk_ids: Tensor, placement: Placement) -> int:
    """Return B: each token goes to at most min(k, ep) ep ranks of etp ranks each."""
    tokens, k = topk_ids.shape
    return tokens * min(k, placement.ep) * placement.etp


def positions_of_true(flags: Tensor, bound: int) -> Tensor:
    """Return the positions of at most ``bound`` true ``flags``, then zeros: [bound] int64."""
    places = torch.where(flags, flags.cumsum(0) - 1, bound)
    positions = torch.zeros(bound + 1, dtype=torch.int64, device=flags.device)
    positions.scatter_(0, places, torch.arange(flags.numel(), device=flags.device))
    return positions[:bound]


def local_ids_at_destination(
    topk_ids: Tensor, destination: Tensor, tokens: Tensor, placement: Placement
) -> Tensor:
    """Return local ids of sent rows' slots at ``destination`` [S]: [S, k] int32, -1 for experts elsewhere."""
    ids = topk_ids[tokens].long()
    is_at_destination = placement.owner[ids] == (destination // placement.etp)[:, None]
    return torch.where(is_at_destination, placement.local[ids], -1)
