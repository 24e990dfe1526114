"""Dispatch as all-to-all does on GPUs: rows are packed before the host knows how many there are.

A GPU computes the number of rows, and the host would have to wait for it before it could size a tensor. An
upper bound B is known without waiting: no token goes to more ranks than it has slots, nor to more than there
are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Pending, Tag
from xpar.comm.dispatch.alltoall import (
    AllToAllDispatcher,
    AllToAllPlan,
    exchange_counts,
    local_ids_at_destination,
)
from xpar.comm.dispatch.base import (
    DispatchPlan,
    Traffic,
    agree_on_plan,
    decode_routing,
    destination_mask,
    encode_routing,
)
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import gather_rows, sum_rows

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
    """The rows that this rank sends: the first ``sum(counts)`` of B; others copy token 0.

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


@dataclass(frozen=True)
class EarlyPlan:
    """The plan of rows that are laid out before the host knows their number.

    Attributes:
        outgoing: The rows to send.
        exchanged: The plan with all numbers; waiting for it is collective, and dispatch waits for it first.
    """

    outgoing: OutgoingRows
    exchanged: Pending[AllToAllPlan]


class EarlyAllToAllDispatcher(AllToAllDispatcher):
    """An all-to-all whose GPU packs rows while the host waits for their number.

    In exact mode, whose slots must be counted first, it is the general one.
    """

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        if exact:
            return super().plan(routing, tag=tag, hidden_size=hidden_size, dtype=dtype, exact=exact)
        own, _ = agree_on_plan(self, routing, tag, hidden_size, dtype, exact)
        outgoing = OutgoingRows.start(own, self.placement)
        state = EarlyPlan(outgoing, Pending(lambda: self._exchange(outgoing)))
        return DispatchPlan(own, exact, Pending(lambda: self._traffic(outgoing.counts.wait())), state)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        if plan.exact:
            return super().dispatch(hidden_states, plan)
        state: EarlyPlan = plan.dispatcher_state
        rows = state.outgoing.pack_early(hidden_states)
        leaving = sum(state.outgoing.counts.wait())
        if rows is None:
            rows = gather_rows(hidden_states, state.outgoing.tokens[:leaving])
        counted = state.exchanged.wait()
        pending = self.group.all_to_all_v(rows[:leaving], counted.send, counted.recv)
        arrived = counted.arrived
        return Pending(lambda: ExpertInput(pending.wait(), arrived.topk_ids, arrived.topk_weights))

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        if plan.exact:
            return super().combine(outputs, plan)
        counted, tokens = plan.dispatcher_state.exchanged.wait(), plan.local_routing.topk_ids.shape[0]
        back = self.group.all_to_all_v(outputs, counted.back_send, counted.back_recv)
        return Pending(lambda: Distributed(sum_rows(back.wait(), counted.tokens, tokens), Full()))

    def _exchange(self, outgoing: OutgoingRows) -> AllToAllPlan:
        """Exchange the numbers of rows, then their local ids and weights; collective."""
        send = outgoing.counts.wait()
        recv = exchange_counts(self.group, send)
        encoded = self.group.all_to_all_v(outgoing.encoded[: sum(send)], send, recv).wait()
        tokens = outgoing.tokens[: sum(send)]
        return AllToAllPlan(tokens, decode_routing(encoded), send, recv, recv, send, None)

    def _traffic(self, send: list[int]) -> Traffic:
        return Traffic.of(self.group.rank, send, sum(send))


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
