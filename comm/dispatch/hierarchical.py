"""Dispatch of one row per (token, node) across the network, fanned out inside the node.

Rank l of a node exchanges with rank l of every other node (its rail), so that each row leaves and enters a
node once. The rows that arrive lie beside the rank's own tokens in the node's shared window, where the ranks
of their experts read them in place. Their outputs are summed there, and one row goes home.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.dispatch.alltoall import exchange_counts, invert_slots, returning_slots, sum_per_rank
from xpar.comm.dispatch.base import (
    Capabilities,
    Dispatcher,
    DispatchPlan,
    DispatchRequest,
    Traffic,
    agree_on_plan,
    decode_routing,
    encode_routing,
    nodes_of_group,
)
from xpar.comm.dispatch.expected_traffic import expected_crossings
from xpar.comm.dispatch.shared_memory import SharedMemoryDispatcher, lacks_window_room
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import active_rows, gather_rows, sum_rows, weighted_sum

LEAST_GAIN = 0.95
"""``auto`` takes this dispatcher if it sends at most this part of the rows that one row per rank sends"""


@dataclass(frozen=True)
class HierarchicalPlan:
    """The plan of one step between the nodes and inside this one.

    Attributes:
        tokens: [S] int64, the token of each row that this rank sends to another node, by node.
        send: Such rows to each rank of the group.
        recv: Such rows from each rank of the group.
        inside: The plan inside the node, whose entries are this rank's tokens and then the rows that arrive.
        back_send: Rows to each rank on the way back.
        back_recv: Rows from each rank on the way back.
        slots: In exact mode, the flat (token, slot) index of each row that comes back, int64; else None.
    """

    tokens: Tensor
    send: list[int]
    recv: list[int]
    inside: DispatchPlan
    back_send: list[int]
    back_recv: list[int]
    slots: Tensor | None


class HierarchicalDispatcher(Dispatcher):
    """A dispatcher for groups on several nodes, whose ranks are ordered by node.

    All slices of an expert lie on one node. ``node_group``: the ranks of ``group`` on this node. ``node_of``:
    the node of each rank of ``group``.
    """

    name = "hierarchical"
    capabilities = Capabilities(
        ("cpu",), needs_host_counts=True, graph_capture=False, pipelined=False, row_granularity="node"
    )

    def __init__(
        self, group: Communicator, placement: Placement, node_group: Communicator, node_of: Sequence[int]
    ) -> None:
        self.group, self.placement = group, placement
        nodes = ranks_by_node(node_of)
        self._node = next(n for n, ranks in enumerate(nodes) if group.rank in ranks)
        self._peers = rail_peers(nodes, group.rank)
        self._node_of_owner = node_of_owners(nodes, placement)
        ranks = nodes[self._node]
        ep_ranks = range(placement.ep_rank(ranks[0]), placement.ep_rank(ranks[-1] + 1))
        self._inside = SharedMemoryDispatcher(node_group, placement.within(ep_ranks))

    @classmethod
    def impossible(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        wrong_device = super().impossible(grid, placement, request)
        return wrong_device or _split_slices(nodes_of_group(grid), grid.shape.etp)

    @classmethod
    def unsuitable(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        nodes, experts = nodes_of_group(grid), placement.num_experts
        if len(set(nodes)) == 1:
            return "all ranks of an expert group lie on one node"
        per_rank, per_node = (
            expected_crossings(experts, min(request.top_k, experts), grid.shape.etp, nodes, by_node=by_node)
            for by_node in (False, True)
        )
        if per_node >= LEAST_GAIN * per_rank:
            return f"a token sends {per_node:.2f} rows to other nodes, and {per_rank:.2f} with one row a rank"
        return lacks_window_room(grid)

    @classmethod
    def build(cls, grid: ProcessGrid, placement: Placement) -> Dispatcher:
        return cls(grid.moe, placement, grid.moe_node, nodes_of_group(grid))

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, _ = agree_on_plan(self, routing, tag, hidden_size, dtype, exact)
        on_node = self._node_of_owner[self.placement.owners(own.topk_ids)]
        mask = node_mask(on_node, len(self._peers))
        stays = int(mask[self._node].sum())
        mask[self._node] = False
        pairs = mask.nonzero()
        tokens = pairs[:, 1]
        is_there = on_node[tokens] == pairs[:, :1]
        send = [0] * self.group.size
        for peer, rows in zip(self._peers, mask.sum(1).tolist(), strict=True):
            send[peer] += rows
        recv = exchange_counts(self.group, send)
        encoded = encode_routing(
            Routing(own.topk_ids[tokens].masked_fill(~is_there, -1), own.topk_weights[tokens])
        )
        arrived = decode_routing(self.group.all_to_all_v(encoded, send, recv).wait())
        entries = Routing(
            torch.cat([own.topk_ids.to(torch.int32), arrived.topk_ids]),
            torch.cat([own.topk_weights.float(), arrived.topk_weights]),
        )
        inside = self._inside.plan(entries, tag=tag, hidden_size=hidden_size, dtype=dtype, exact=exact)
        back_send, back_recv, slots = recv, send, None
        if exact:
            slots, back_recv = returning_slots(is_there, tokens, send)
            back_send = sum_per_rank((arrived.topk_ids >= 0).sum(1), recv)
        state = HierarchicalPlan(tokens, send, recv, inside, back_send, back_recv, slots)
        sent = tuple(stays if r == self.group.rank else n for r, n in enumerate(send))
        at_home = int((on_node == self._node).sum()) if exact else stays
        traffic = Traffic.of(self.group.rank, sent, at_home + sum(back_recv))
        return DispatchPlan(own, exact, traffic, state)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        state: HierarchicalPlan = plan.dispatcher_state
        own = hidden_states.shape[0]
        entries = self._inside.token_buffer(hidden_states, state.inside)
        outgoing = gather_rows(hidden_states, state.tokens)
        moving = self.group.all_to_all_v(outgoing, state.send, state.recv, out=entries[own:])
        entries[:own].copy_(hidden_states)

        def complete() -> ExpertInput:
            moving.wait()
            return self._inside.start_reading(hidden_states, state.inside).wait()

        return Pending(complete)

    def output(self, plan: DispatchPlan, num_outputs: int, like: Tensor) -> Tensor | None:
        return self._inside.output(plan.dispatcher_state.inside, num_outputs, like)

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        state: HierarchicalPlan = plan.dispatcher_state
        if state.slots is None:
            inside = self._inside.combine(outputs, state.inside)
            return Pending(lambda: self._sum_at_home(inside.wait().tensor, plan.local_routing, state))
        all_outputs = self._inside.publish_outputs(outputs, state.inside)
        return Pending(lambda: self._sum_slots(all_outputs.wait(), plan.local_routing, state))

    def _sum_at_home(self, sums: Tensor, routing: Routing, state: HierarchicalPlan) -> Distributed:
        """Send ``sums`` of arrived rows home and add those that come back; collective."""
        tokens = routing.topk_ids.shape[0]
        rows = sums.new_empty(tokens + len(state.tokens), sums.shape[1])
        moving = self.group.all_to_all_v(sums[tokens:], state.back_send, state.back_recv, out=rows[tokens:])
        rows[:tokens] = sums[:tokens]
        moving.wait()
        home = torch.cat([torch.arange(tokens), state.tokens])
        return Distributed(sum_rows(rows, home, tokens), Full())

    def _sum_slots(self, all_outputs: Tensor, routing: Routing, state: HierarchicalPlan) -> Distributed:
        """Send every slot's output home as it is and add it there in slot order; collective."""
        positions = self._inside.slot_positions(state.inside)
        tokens = routing.topk_ids.shape[0]
        own = active_rows(all_outputs, positions[:tokens])
        outgoing = active_rows(all_outputs, positions[tokens:])
        back = self.group.all_to_all_v(outgoing, state.back_send, state.back_recv).wait()
        assert state.slots is not None
        slots = torch.cat([(positions[:tokens].reshape(-1) >= 0).nonzero()[:, 0], state.slots])
        of_slot = invert_slots(slots, routing.topk_ids.shape)
        return Distributed(weighted_sum(torch.cat([own, back]), routing.topk_weights, of_slot), Full())


def _split_slices(nodes: Sequence[int], etp: int) -> str | None:
    """Return that an expert's slices lie on two nodes, or None; ``nodes``: of each rank."""
    split = next((e for e in range(0, len(nodes), etp) if len(set(nodes[e : e + etp])) > 1), None)
    if split is None:
        return None
    ranks = f"ranks {split} to {split + etp - 1} of an expert group"
    return f"etp={etp}: {ranks} slice the same experts on two nodes"


def ranks_by_node(node_of: Sequence[int]) -> list[range]:
    """Return the ranks of each node, which are consecutive, in the order in which nodes appear."""
    starts = [r for r, node in enumerate(node_of) if r == 0 or node != node_of[r - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(node_of)], strict=True)]


def rail_peers(nodes: Sequence[range], rank: int) -> list[int]:
    """Return the rank of each node with the index of ``rank``, modulo the node's ranks."""
    index = next(rank - ranks.start for ranks in nodes if rank in ranks)
    return [ranks[index % len(ranks)] for ranks in nodes]


def node_of_owners(nodes: Sequence[range], placement: Placement) -> Tensor:
    """Return the node of each ep rank, [ep + 1] int64; the last entry is N, for dropped slots."""
    of_rank = [n for n, ranks in enumerate(nodes) for _ in ranks]
    return torch.tensor([*of_rank[:: placement.etp], len(nodes)])


def node_mask(on_node: Tensor, nodes: int) -> Tensor:
    """Return [N, T] bool: whether a token has a slot on a node; ``on_node`` [T, k], N: dropped."""
    mask = torch.zeros(on_node.shape[0], nodes + 1, dtype=torch.bool)
    return mask.scatter_(1, on_node, True)[:, :nodes].t().contiguous()
