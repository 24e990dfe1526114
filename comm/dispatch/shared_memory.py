"""Dispatch through a shared window, where ranks read tokens and outputs in place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.dispatch.base import (
    Capabilities,
    Dispatcher,
    DispatchPlan,
    DispatchRequest,
    Traffic,
    agree_on_plan,
    decode_routing,
    destination_mask,
    encode_routing,
    nodes_of_group,
)
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.comm.shared_window import get_window
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import sum_runs, weighted_sum

LEAST_WINDOW_ROOM = 256 << 20
"""bytes of shared memory that ``auto`` wants a node to have left for windows; containers often have 64 MB"""


@dataclass(frozen=True)
class Layout:
    """The layout of rows in the window: all ranks' tokens first, then all ranks' outputs.

    ``tokens``, ``outputs``: this rank's rows among them. ``num_tokens``, ``num_outputs``: those of all ranks.
    """

    tokens: slice
    outputs: slice
    num_tokens: int
    num_outputs: int


@dataclass(frozen=True)
class SharedMemoryPlan:
    """The plan of one step in the window.

    Attributes:
        layout: The layout of the window.
        arrived: Local ids and weights [M, k] of the tokens that this rank's experts read.
        arrived_rows: [M] int64, the row of each of those tokens among the tokens of all ranks.
        back: The rows among all outputs that make up this rank's tokens, by token and then rank.
        runs: [T] int64, how many of ``back`` belong to each token, as :func:`~xpar.kernels.rows.sum_runs`
            takes them.
        positions: In exact mode, in place of both: [T, k] int64, the row of each slot's output; -1 for a
            dropped slot.
    """

    layout: Layout
    arrived: Routing
    arrived_rows: Tensor
    back: Tensor | None = None
    runs: Tensor | None = None
    positions: Tensor | None = None


class SharedMemoryDispatcher(Dispatcher):
    """A dispatcher for ranks that share memory.

    A step has two fences: after the tokens are written, and after the outputs are written. No third one is
    needed: a rank overwrites tokens only after the second fence, when no rank computes any more, and outputs
    only after the next step's first fence, when every rank has summed its own. Where the next step's tokens
    are so many that they lie where outputs lay, its gathering of routing comes first, to which a rank with
    tokens contributes after it has summed; one without has nothing to sum.
    """

    name = "shared-memory"
    capabilities = Capabilities(
        ("cpu",), needs_host_counts=False, graph_capture=False, pipelined=False, single_node=True
    )

    def __init__(self, group: Communicator, placement: Placement) -> None:
        self.group, self.placement = group, placement
        self.window = get_window(group)

    @classmethod
    def impossible(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        wrong_device = super().impossible(grid, placement, request)
        nodes = len(set(nodes_of_group(grid)))
        if wrong_device or nodes == 1:
            return wrong_device
        return f"the {grid.moe.size} ranks of an expert group lie on {nodes} nodes and share no memory"

    @classmethod
    def unsuitable(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        return lacks_window_room(grid)

    @classmethod
    def build(cls, grid: ProcessGrid, placement: Placement) -> Dispatcher:
        return cls(grid.moe, placement)

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, counts = agree_on_plan(self, routing, tag, hidden_size, dtype, exact)
        gathered = decode_routing(self.group.all_gather_v(encode_routing(own), counts))
        first = sum(counts[: self.group.rank])
        own_rows = slice(first, first + counts[self.group.rank])
        state, rows_to_rank = self._plan_window(gathered, own_rows, exact)
        layout = state.layout
        self.window.reserve((layout.num_tokens + layout.num_outputs) * hidden_size * dtype.itemsize)
        back = state.back if state.positions is None else state.positions[state.positions >= 0]
        assert back is not None
        return DispatchPlan(own, exact, Traffic.of(self.group.rank, rows_to_rank, len(back)), state)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        self.token_buffer(hidden_states, plan).copy_(hidden_states)
        return self.start_reading(hidden_states, plan)

    def output(self, plan: DispatchPlan, num_outputs: int, like: Tensor) -> Tensor | None:
        layout: Layout = plan.dispatcher_state.layout
        return self._outputs(layout, like)[layout.outputs]

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        all_outputs = self.publish_outputs(outputs, plan)
        return Pending(lambda: self._sum(all_outputs.wait(), plan))

    def _sum(self, all_outputs: Tensor, plan: DispatchPlan) -> Distributed:
        state: SharedMemoryPlan = plan.dispatcher_state
        if state.positions is not None:
            weights = plan.local_routing.topk_weights
            return Distributed(weighted_sum(all_outputs, weights, state.positions), Full())
        assert state.back is not None and state.runs is not None
        return Distributed(sum_runs(all_outputs, state.back, state.runs), Full())

    # -- the parts of dispatch and combine, for a dispatcher that does more between them
    # -------------------------

    def token_buffer(self, like: Tensor, plan: DispatchPlan) -> Tensor:
        """Return where to write this rank's tokens [T, H] before :meth:`start_reading`."""
        layout: Layout = plan.dispatcher_state.layout
        return self._tokens(layout, like)[layout.tokens]

    def start_reading(self, like: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        """Start the fence after this rank's tokens are written; results in its experts' input."""
        state: SharedMemoryPlan = plan.dispatcher_state
        tokens, fence = self._tokens(state.layout, like), self.window.start_fence()

        def complete() -> ExpertInput:
            fence.wait()
            return ExpertInput(tokens, state.arrived.topk_ids, state.arrived.topk_weights, state.arrived_rows)

        return Pending(complete)

    def publish_outputs(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Tensor]:
        """Write this rank's ``outputs`` to the window, unless they lie there, and start the fence.

        The result is the outputs of all ranks, one row per arrived token or, in exact mode, per slot.
        """
        layout: Layout = plan.dispatcher_state.layout
        all_outputs = self._outputs(layout, outputs)
        own = all_outputs[layout.outputs]
        if outputs.data_ptr() != own.data_ptr():
            own.copy_(outputs)
        fence = self.window.start_fence()

        def complete() -> Tensor:
            fence.wait()
            return all_outputs

        return Pending(complete)

    def slot_positions(self, plan: DispatchPlan) -> Tensor:
        """Return each slot's row among all outputs in exact mode: [T, k] int64, -1 if dropped."""
        state: SharedMemoryPlan = plan.dispatcher_state
        assert state.positions is not None
        return state.positions

    def _tokens(self, layout: Layout, like: Tensor) -> Tensor:
        return self.window.view(0, (layout.num_tokens, like.shape[1]), like.dtype)

    def _outputs(self, layout: Layout, like: Tensor) -> Tensor:
        first_byte = layout.num_tokens * like.shape[1] * like.element_size()
        return self.window.view(first_byte, (layout.num_outputs, like.shape[1]), like.dtype)

    def _plan_window(self, gathered: Routing, own: slice, exact: bool) -> tuple[SharedMemoryPlan, list[int]]:
        """Derive the plan, and the rows to each rank, from all tokens' routing; ``own``: this rank's."""
        mask = destination_mask(gathered.topk_ids, self.placement)
        arrived_rows = mask[self.group.rank].nonzero()[:, 0]
        ep_rank = self.placement.ep_rank(self.group.rank)
        local = self.placement.local_ids(gathered.topk_ids[arrived_rows], ep_rank)
        arrived = Routing(local, gathered.topk_weights[arrived_rows])
        sent = mask[:, own]
        rows_to_rank = sent.sum(1).tolist()
        if exact:
            positions, outputs = self.placement.slot_order(gathered.topk_ids)
            layout = self._layout(own, mask.shape[1], outputs)
            return SharedMemoryPlan(layout, arrived, arrived_rows, positions=positions[own]), rows_to_rank
        outputs = mask.sum(1).tolist()
        position = (mask.reshape(-1).cumsum(0) - 1).view(mask.shape)
        back = position[:, own].t()[sent.t()]  # by token, then by rank
        layout = self._layout(own, mask.shape[1], outputs)
        return SharedMemoryPlan(layout, arrived, arrived_rows, back, sent.sum(0)), rows_to_rank

    def _layout(self, own: slice, num_tokens: int, outputs: list[int]) -> Layout:
        """Lay out the window for ``outputs[r]`` outputs of rank r."""
        first = sum(outputs[: self.group.rank])
        return Layout(own, slice(first, first + outputs[self.group.rank]), num_tokens, sum(outputs))


def lacks_window_room(grid: ProcessGrid) -> str | None:
    """Return that a node has too little shared memory left for windows, or None."""
    room = min(grid.world.window_room[r] for r in grid.moe.world_ranks)
    if room >= LEAST_WINDOW_ROOM:
        return None
    least = f"{LEAST_WINDOW_ROOM / 1e6:.0f} MB"
    return f"{room / 1e6:.0f} MB of shared memory are left on the node, less than {least}"
