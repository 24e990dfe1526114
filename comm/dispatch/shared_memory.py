"""Ranks of one node write their tokens once into a shared window and read each other's rows and outputs in place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.dispatch.base import (
    Capabilities,
    DispatchPlan,
    Traffic,
    agree_on_plan,
    decode_routing,
    encode_routing,
    goes_to,
)
from xpar.comm.handshake import Tag
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.comm.shared_window import window_of
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import sum_runs, weighted_sum


@dataclass(frozen=True)
class Layout:
    """Where rows lie in the window: all ranks' tokens first, all ranks' outputs after them.

    ``tokens``, ``outputs``: this rank's rows of either part. ``num_tokens``, ``num_outputs``: rows of all ranks.
    """

    tokens: slice
    outputs: slice
    num_tokens: int
    num_outputs: int


@dataclass(frozen=True)
class SharedMemoryPlan:
    """``arrived``: local ids and weights of the rows for this rank's experts; ``rows``: which tokens they are.

    ``back`` and ``runs``: the outputs that make up each own token, as :func:`~xpar.kernels.rows.sum_runs` takes
    them. ``positions`` [T, k]: in exact mode, where each slot's output lies instead.
    """

    layout: Layout
    arrived: Routing
    rows: Tensor
    back: Tensor | None = None
    runs: Tensor | None = None
    positions: Tensor | None = None


class SharedMemoryDispatcher:
    """For ranks that share memory. A step has two fences: after the tokens are written, and after the outputs are.

    No third one is needed: a rank overwrites tokens only after the second fence, when nobody computes any more, and
    outputs only after the next step's first fence, when everybody has summed theirs.
    """

    name = "shared-memory"
    capabilities = Capabilities(("cpu",), needs_host_counts=False, graph_capture=False, pipelined=False)

    def __init__(self, group: Communicator, placement: Placement) -> None:
        self.group, self.placement = group, placement
        self._window = window_of(group)

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, counts = agree_on_plan(self.group, self.name, routing, tag, hidden_size, dtype, exact)
        everyone = decode_routing(self.group.all_gather_v(encode_routing(own), counts))
        first = sum(counts[: self.group.rank])
        mine = slice(first, first + counts[self.group.rank])
        detail, rows = self._detail(everyone, mine, exact)
        layout = detail.layout
        self._window.reserve((layout.num_tokens + layout.num_outputs) * hidden_size * dtype.itemsize)
        back = detail.back if detail.positions is None else detail.positions[detail.positions >= 0]
        assert back is not None
        return DispatchPlan(own, exact, Traffic.of(self.group.rank, rows.tolist(), len(back)), detail)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        self.place(hidden_states, plan).copy_(hidden_states)
        return self.arrive(hidden_states, plan)

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        layout: Layout = plan.detail.layout
        return self._outputs(layout, like)[layout.outputs]

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        everyones = self.settle(outputs, plan)
        return Pending(lambda: self._sum(everyones.wait(), plan))

    def _sum(self, everyones: Tensor, plan: DispatchPlan) -> Distributed:
        d: SharedMemoryPlan = plan.detail
        if d.positions is not None:
            return Distributed(weighted_sum(everyones, plan.own.topk_weights, d.positions), Full())
        assert d.back is not None and d.runs is not None
        return Distributed(sum_runs(everyones, d.back, d.runs), Full())

    # -- the steps, one by one, for a dispatcher that does more between them -------------------------------------

    def place(self, like: Tensor, plan: DispatchPlan) -> Tensor:
        """[T, H]: this rank's tokens in the window, to be written before :meth:`arrive`; of the dtype of ``like`` [.., H]."""
        layout: Layout = plan.detail.layout
        return self._tokens(layout, like)[layout.tokens]

    def arrive(self, like: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        """This rank has written its tokens; its experts' input, once every other has."""
        d: SharedMemoryPlan = plan.detail
        tokens, fence = self._tokens(d.layout, like), self._window.arrive()

        def arrived() -> ExpertInput:
            fence.wait()
            return ExpertInput(tokens, d.arrived.topk_ids, d.arrived.topk_weights, d.rows)

        return Pending(arrived)

    def settle(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Tensor]:
        """All ranks' outputs [sum of M or S, H] in the window, once every rank has written its own."""
        layout: Layout = plan.detail.layout
        everyones = self._outputs(layout, outputs)
        place = everyones[layout.outputs]
        if outputs.data_ptr() != place.data_ptr():
            place.copy_(outputs)
        fence = self._window.arrive()

        def settled() -> Tensor:
            fence.wait()
            return everyones

        return Pending(settled)

    def positions(self, plan: DispatchPlan) -> Tensor:
        """[T, k] int64: in exact mode, where each slot's output lies among all; -1 for a dropped one."""
        d: SharedMemoryPlan = plan.detail
        assert d.positions is not None
        return d.positions

    def _tokens(self, layout: Layout, like: Tensor) -> Tensor:
        return self._window.view(0, (layout.num_tokens, like.shape[1]), like.dtype)

    def _outputs(self, layout: Layout, like: Tensor) -> Tensor:
        first_byte = layout.num_tokens * like.shape[1] * like.element_size()
        return self._window.view(first_byte, (layout.num_outputs, like.shape[1]), like.dtype)

    def _detail(self, everyone: Routing, mine: slice, exact: bool) -> tuple[SharedMemoryPlan, Tensor]:
        """This rank's part of what everybody's routing says; and the rows that its tokens send to each rank."""
        goes = goes_to(everyone.topk_ids, self.placement)
        here = goes[self.group.rank]
        rows = here.nonzero()[:, 0]
        local = self.placement.local_ids(everyone.topk_ids[rows], self.group.rank // self.placement.etp)
        arrived = Routing(local, everyone.topk_weights[rows])
        sent = goes[:, mine]
        if exact:
            positions, made = self.placement.slot_order(everyone.topk_ids)
            layout = self._layout(mine, goes.shape[1], made)
            return SharedMemoryPlan(layout, arrived, rows, positions=positions[mine]), sent.sum(1)
        made = goes.sum(1).tolist()
        position = (goes.reshape(-1).cumsum(0) - 1).view(goes.shape)
        back = position[:, mine].t()[sent.t()]  # by token, then by rank
        layout = self._layout(mine, goes.shape[1], made)
        return SharedMemoryPlan(layout, arrived, rows, back, sent.sum(0)), sent.sum(1)

    def _layout(self, mine: slice, num_tokens: int, made: list[int]) -> Layout:
        first = sum(made[: self.group.rank])
        return Layout(mine, slice(first, first + made[self.group.rank]), num_tokens, sum(made))
