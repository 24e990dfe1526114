"""One row per (token, node) crosses the network; inside the node it is fanned out and its outputs are summed.

Rank l of a node exchanges with rank l of every other (its rail), so that each row leaves and enters a node once. What
arrives lies beside the rank's own tokens in the node's shared window, where the ranks of its experts read it in place;
their outputs are summed there, and one row goes home.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.dispatch.alltoall import exchange_counts, per_rank, slot_positions, slots_back
from xpar.comm.dispatch.base import (
    Capabilities,
    DispatchPlan,
    Traffic,
    agree_on_plan,
    decode_routing,
    encode_routing,
)
from xpar.comm.dispatch.shared_memory import SharedMemoryDispatcher
from xpar.comm.handshake import Tag
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import active_rows, gather_rows, sum_rows, weighted_sum


@dataclass(frozen=True)
class HierarchicalPlan:
    """``tokens`` [S]: the token of each row that crosses, by node; ``send``, ``recv``: such rows per rank of the group.

    ``inside``: the plan of the node, whose entries are this rank's tokens and then what arrives. ``back_send``,
    ``back_recv``: rows per rank on the way back. ``slots`` [S']: in exact mode the flat (token, slot) of each of those.
    """

    tokens: Tensor
    send: list[int]
    recv: list[int]
    inside: DispatchPlan
    back_send: list[int]
    back_recv: list[int]
    slots: Tensor | None


class HierarchicalDispatcher:
    """For groups on several nodes. ``inside``: the group's ranks on this node; ``node_of``: the node of each rank.

    Ranks are ordered by node, and all slices of an expert lie on one node.
    """

    name = "hierarchical"
    capabilities = Capabilities(("cpu",), needs_host_counts=True, graph_capture=False, pipelined=False)

    def __init__(
        self, group: Communicator, placement: Placement, inside: Communicator, node_of: Sequence[int]
    ) -> None:
        self.group, self.placement = group, placement
        members = ranks_by_node(node_of)
        self._node = next(n for n, ranks in enumerate(members) if group.rank in ranks)
        self._peers = rails(members, group.rank)
        self._node_of_owner = node_of_owners(members, placement)
        here, etp = members[self._node], placement.etp
        experts_here = placement.within(range(here[0] // etp, (here[-1] + 1) // etp))
        self._inside = SharedMemoryDispatcher(inside, experts_here)

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, _ = agree_on_plan(self.group, self.name, routing, tag, hidden_size, dtype, exact)
        on_node = self._node_of_owner[self.placement.owners(own.topk_ids)]
        goes = crossings(on_node, len(self._peers))
        stays = int(goes[self._node].sum())
        goes[self._node] = False
        pairs = goes.nonzero()
        tokens = pairs[:, 1]
        there = on_node[tokens] == pairs[:, :1]
        send = [0] * self.group.size
        for peer, rows in zip(self._peers, goes.sum(1).tolist(), strict=True):
            send[peer] += rows
        recv = exchange_counts(self.group, send)
        leaving = encode_routing(
            Routing(own.topk_ids[tokens].masked_fill(~there, -1), own.topk_weights[tokens])
        )
        arrived = decode_routing(self.group.all_to_all_v(leaving, send, recv).wait())
        entries = Routing(
            torch.cat([own.topk_ids.to(torch.int32), arrived.topk_ids]),
            torch.cat([own.topk_weights.float(), arrived.topk_weights]),
        )
        inside = self._inside.plan(entries, tag=tag, hidden_size=hidden_size, dtype=dtype, exact=exact)
        back_send, back_recv, slots = recv, send, None
        if exact:
            slots, back_recv = slots_back(there, tokens, send)
            back_send = per_rank((arrived.topk_ids >= 0).sum(1), recv)
        detail = HierarchicalPlan(tokens, send, recv, inside, back_send, back_recv, slots)
        send_all = tuple(stays if r == self.group.rank else n for r, n in enumerate(send))
        at_home = int((on_node == self._node).sum()) if exact else stays
        return DispatchPlan(
            own, exact, Traffic.of(self.group.rank, send_all, at_home + sum(back_recv)), detail
        )

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        d: HierarchicalPlan = plan.detail
        own = hidden_states.shape[0]
        entries = self._inside.place(hidden_states, d.inside)
        leaving = gather_rows(hidden_states, d.tokens)
        moving = self.group.all_to_all_v(leaving, d.send, d.recv, out=entries[own:])
        entries[:own].copy_(hidden_states)

        def arrive() -> ExpertInput:
            moving.wait()
            return self._inside.arrive(hidden_states, d.inside).wait()

        return Pending(arrive)

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        return self._inside.output(plan.detail.inside, rows, like)

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        d: HierarchicalPlan = plan.detail
        if d.slots is None:
            inside = self._inside.combine(outputs, d.inside)
            return Pending(lambda: self._sum_at_home(inside.wait().tensor, plan.own, d))
        settled = self._inside.settle(outputs, d.inside)
        return Pending(lambda: self._sum_slots(settled.wait(), plan.own, d))

    def _sum_at_home(self, sums: Tensor, own: Routing, d: HierarchicalPlan) -> Distributed:
        """``sums`` [entries, H]: what this node makes of each entry; the rest of a token's sum comes from other nodes."""
        tokens = own.topk_ids.shape[0]
        rows = sums.new_empty(tokens + len(d.tokens), sums.shape[1])
        coming = self.group.all_to_all_v(sums[tokens:], d.back_send, d.back_recv, out=rows[tokens:])
        rows[:tokens] = sums[:tokens]
        coming.wait()
        home = torch.cat([torch.arange(tokens), d.tokens])
        return Distributed(sum_rows(rows, home, tokens), Full())

    def _sum_slots(self, everyones: Tensor, own: Routing, d: HierarchicalPlan) -> Distributed:
        """Every slot's output comes home as it is, to be added there in slot order."""
        positions = self._inside.positions(d.inside)
        tokens = own.topk_ids.shape[0]
        here = active_rows(everyones, positions[:tokens])
        leaving = active_rows(everyones, positions[tokens:])
        back = self.group.all_to_all_v(leaving, d.back_send, d.back_recv).wait()
        assert d.slots is not None
        slots = torch.cat([(positions[:tokens].reshape(-1) >= 0).nonzero()[:, 0], d.slots])
        of_slot = slot_positions(slots, own.topk_ids.shape)
        return Distributed(weighted_sum(torch.cat([here, back]), own.topk_weights, of_slot), Full())


def ranks_by_node(node_of: Sequence[int]) -> list[range]:
    """The ranks of each node, in the order in which nodes appear; they are consecutive."""
    starts = [r for r, node in enumerate(node_of) if r == 0 or node != node_of[r - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(node_of)], strict=True)]


def rails(members: Sequence[range], rank: int) -> list[int]:
    """For each node the rank there that ``rank`` sends to: the one with its own place, or what wraps round to it."""
    place = next(rank - ranks.start for ranks in members if rank in ranks)
    return [ranks[place % len(ranks)] for ranks in members]


def node_of_owners(members: Sequence[range], placement: Placement) -> Tensor:
    """[ep + 1] int64: the node of each ep rank; the last entry, of a dropped slot, is the number of nodes."""
    nodes = [n for n, ranks in enumerate(members) for _ in ranks]
    return torch.tensor([*nodes[:: placement.etp], len(members)])


def crossings(on_node: Tensor, nodes: int) -> Tensor:
    """[N, T] bool: whether any of a token's slots lies on a node; ``on_node`` [T, k] int64, N for a dropped slot."""
    goes = torch.zeros(on_node.shape[0], nodes + 1, dtype=torch.bool)
    return goes.scatter_(1, on_node, True)[:, :nodes].t().contiguous()
