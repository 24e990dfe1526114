"""One row per (token, destination rank), never one per (token, expert); its slots are summed where it went."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.dispatch.base import DispatchPlan, Traffic, agree, goes_to, pack, unpack
from xpar.comm.handshake import Tag
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import gather_rows, sum_rows, weighted_sum


@dataclass(frozen=True)
class Detail:
    """``tokens`` [S]: the token of each row sent, by destination; ``arrived``: local ids and weights of each row.

    ``send``, ``recv``: rows per rank. ``back_send``, ``back_recv``: rows per rank on the way back.
    ``slots`` [S']: in exact mode the flat (token, slot) index of each row that comes back.
    ``rows`` [M]: where the arrived rows lie, if not one after the other.
    """

    tokens: Tensor
    arrived: Routing
    send: list[int]
    recv: list[int]
    back_send: list[int]
    back_recv: list[int]
    slots: Tensor | None
    rows: Tensor | None = None


class AllToAllDispatcher:
    """The general dispatcher: any number of ranks, uneven tokens and experts."""

    name = "alltoall"

    def __init__(self, group: Communicator, placement: Placement) -> None:
        self.group, self.placement = group, placement

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, _ = agree(self.group, self.name, routing, tag, hidden_size, dtype, exact)
        destination, tokens, send = destinations(own.topk_ids, self.placement)
        recv = self._exchange_counts(send)
        ids = ids_there(own.topk_ids, destination, tokens, self.placement)
        packed = pack(Routing(ids, own.topk_weights[tokens]))
        arrived = unpack(self.group.all_to_all_v(packed, send, recv).wait())
        back_send, back_recv, slots = recv, send, None
        if exact:
            slots, back_recv = slots_back(own.topk_ids, destination, tokens, send, self.placement)
            back_send = per_rank((arrived.topk_ids >= 0).sum(1), recv)
        remote = len(tokens) - send[self.group.rank]
        traffic = Traffic(len(tokens), remote, sum(back_recv))
        return DispatchPlan(
            own, exact, traffic, Detail(tokens, arrived, send, recv, back_send, back_recv, slots)
        )

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        d: Detail = plan.detail
        rows = hidden_states.new_empty(sum(d.recv), hidden_states.shape[1])
        first, own = sum(d.send[: self.group.rank]), d.send[self.group.rank]
        mine = slice(first, first + own)
        at = sum(d.recv[: self.group.rank])
        gather_rows(hidden_states, d.tokens[mine], out=rows[at : at + own])
        leaving = torch.cat([d.tokens[:first], d.tokens[first + own :]])
        pending = _exchange(self.group, gather_rows(hidden_states, leaving), d.send, d.recv, rows)
        return Pending(lambda: ExpertInput(pending.wait(), d.arrived.topk_ids, d.arrived.topk_weights))

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        return None

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Distributed:
        return return_rows(self.group, outputs, plan.detail, plan.own)

    def _exchange_counts(self, send: list[int]) -> list[int]:
        rows = self.group.all_to_all_v(
            torch.tensor(send, dtype=torch.int64), [1] * self.group.size, [1] * self.group.size
        )
        return [int(n) for n in rows.wait().tolist()]


def destinations(topk_ids: Tensor, placement: Placement) -> tuple[Tensor, Tensor, list[int]]:
    """(rank, token) of every row to send, by rank and then token, and the rows per rank: rows de-duplicated by rank."""
    by_rank = goes_to(topk_ids, placement)
    pairs = by_rank.nonzero()
    return pairs[:, 0], pairs[:, 1], by_rank.sum(1).tolist()


def ids_there(topk_ids: Tensor, destination: Tensor, tokens: Tensor, placement: Placement) -> Tensor:
    """[S, k] int32: for each row sent, the local ids of its slots at its destination, -1 for slots elsewhere."""
    ids = topk_ids[tokens].long()
    there = placement.owner[ids] == (destination // placement.etp)[:, None]
    return torch.where(there, placement.local[ids], -1)


def slots_back(
    topk_ids: Tensor, destination: Tensor, tokens: Tensor, send: list[int], placement: Placement
) -> tuple[Tensor, list[int]]:
    """In exact mode: the flat (token, slot) of each row that comes back, by rank, and the rows per rank."""
    active = ids_there(topk_ids, destination, tokens, placement) >= 0
    k = topk_ids.shape[1]
    return (tokens[:, None] * k + torch.arange(k))[active], per_rank(active.sum(1), send)


def return_rows(group: Communicator, outputs: Tensor, d: Detail, own: Routing) -> Distributed:
    """Send each row's output home and sum there: by source rank, or in exact mode in slot order with the weights."""
    back = outputs.new_empty(sum(d.back_recv), outputs.shape[1])
    r, send, recv = group.rank, d.back_send, d.back_recv
    start, at, mine = sum(send[:r]), sum(recv[:r]), send[r]
    leaving = torch.cat([outputs[:start], outputs[start + mine :]])
    pending = _exchange(group, leaving, send, recv, back)
    back[at : at + mine] = outputs[start : start + mine]
    pending.wait()
    if d.slots is None:
        return Distributed(sum_rows(back, d.tokens, own.topk_ids.shape[0]), Full())
    positions = torch.full((own.topk_ids.numel(),), -1, dtype=torch.int64)
    positions[d.slots] = torch.arange(len(d.slots))
    return Distributed(weighted_sum(back, own.topk_weights, positions.view(own.topk_ids.shape)), Full())


def per_rank(rows_of_entry: Tensor, entries_of_rank: list[int]) -> list[int]:
    ends = np.cumsum([0, *entries_of_rank])
    total = torch.nn.functional.pad(rows_of_entry.cumsum(0), (1, 0))[torch.from_numpy(ends)]
    return [int(n) for n in total.diff().tolist()]


def _exchange(
    group: Communicator, leaving: Tensor, send: list[int], recv: list[int], out: Tensor
) -> Pending[Tensor]:
    """Move what leaves the rank; the rank's own rows, already in place inside ``out``, are stepped over."""
    own = group.rank
    others_send = [0 if r == own else n for r, n in enumerate(send)]
    return group.all_to_all_v(leaving, others_send, recv, out=out, skip=own)
