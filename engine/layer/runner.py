"""One mixture-of-experts layer on this rank: the six steps in order."""

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor, nn

from xpar.comm.communicator import Tag
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan, Traffic
from xpar.comm.grid import ProcessGrid
from xpar.comm.reduction import Distributed
from xpar.engine.config import LayerConfig
from xpar.engine.layer.addends import add_identity_and_bias
from xpar.engine.layer.cuda_graph import CapturedLayer
from xpar.engine.layer.expert_load import LoadCounter
from xpar.engine.layer.fused_shared_experts import SharedSlots
from xpar.engine.layer.latent import ExpertInputProjection
from xpar.engine.layer.output import LayerOutput, rest_of
from xpar.engine.layer.route_and_compute import Depth, RouteAndCompute
from xpar.engine.layer.shared_expert_overlap import Overlap, SharedExpertsCall, SharedOrder
from xpar.engine.layer.shared_experts import SharedExperts
from xpar.engine.layer.stage_timer import StageTimer, default_stage_timer
from xpar.engine.layer.token_split import choose_token_split
from xpar.engine.layer.torch_compile import RunnerHandle, moe_forward, moe_forward_separately
from xpar.engine.routing import RoutingRule, weigh_input
from xpar.engine.routing.router import FusedGateRouter
from xpar.kernels.contracts import ExpertInput, ExpertKernel, Routing


class MoERunner(nn.Module):
    """Routes, plans, dispatches, computes, combines and finishes; every rank of ``grid`` calls it together.

    ``kernel``: this rank's experts, or None if it holds none. ``shared``: experts beside the routed ones, or ``fused``:
    experts among them that every token has. ``one_call``: the steps that take a single call. ``exact``: slot outputs travel unsummed and are added
    in slot order where the token lives, so that the bits do not depend on the number of ranks. ``sequence_parallel``:
    the ranks of a tp group give different tokens, and get the outputs of their own. ``shared_order``: when the shared
    experts compute.
    """

    def __init__(
        self,
        config: LayerConfig,
        grid: ProcessGrid,
        router: RoutingRule,
        dispatcher: Dispatcher,
        kernel: ExpertKernel | None,
        shared: SharedExperts | None = None,
        fused: SharedSlots | None = None,
        one_call: RouteAndCompute | None = None,
        *,
        dtype: torch.dtype,
        exact: bool = False,
        sequence_parallel: bool = False,
        shared_order: SharedOrder = SharedOrder.AUTO,
        layer: int = 0,
        output_bias: Tensor | None = None,
        latent: ExpertInputProjection | None = None,
    ) -> None:
        super().__init__()
        self.config, self.grid, self.layer = config, grid, layer
        self.router, self.dispatcher, self.kernel = router, dispatcher, kernel
        self.shared, self.fused, self.one_call = shared, fused, one_call
        self.dtype, self.exact = dtype, exact
        self.output_bias, self.latent = output_bias, latent
        self.tokens = choose_token_split(grid, dispatcher, sequence_parallel)
        self.overlap = Overlap(SharedOrder.NONE if shared is None else shared_order, grid.device)
        self.load: LoadCounter | None = None
        self.handle = RunnerHandle(self)
        self._idle = default_stage_timer(grid.device)
        self._step = 0

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        layer: int,
        grid: ProcessGrid,
        dtype: torch.dtype | None = None,
        *,
        dispatcher: str = "auto",
        kernel: str = "auto",
        exact: bool = False,
        sequence_parallel: bool = False,
        shared_order: SharedOrder = SharedOrder.AUTO,
        tiles: Path | None = None,
        fuse_shared_experts: bool = False,
        depth: Depth = "auto",
    ) -> "MoERunner":
        """Load layer ``layer`` of a Hugging Face checkpoint, this rank's experts only; collective over the grid.

        ``dtype``: that of the computation, by default the checkpoint's. ``fuse_shared_experts``: compute them as slots
        of the routed product. ``depth``: ``steps`` one by one, ``one-call`` where a kernel covers several, or ``auto``,
        that where it is faster. Raises one error, the same on every
        rank, for a checkpoint, layer, dispatcher, kernel or file of ``tiles`` (from ``xpar tune``) that does not fit.
        """
        from xpar.engine.layer.build import LayerOptions, load_layer

        options = LayerOptions(
            dispatcher, kernel, exact, sequence_parallel, shared_order, tiles, fuse_shared_experts, depth
        )
        return load_layer(path, layer, grid, dtype, options)

    # -- ways to call it: alike up to the sum ---------------------------------------------------------------------

    def forward(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Tensor:
        """[T, H] -> [T, H], both in the layer's dtype.

        ``router_logits``: [T, E], where the caller has them already. ``input_ids``: [T], for routing by token id.
        Under torch.compile it is one opaque operator of the graph.
        """
        if torch.compiler.is_compiling():
            output: Tensor = moe_forward(self.handle, hidden_states, router_logits, input_ids)
            return output
        parts = self.steps(hidden_states, router_logits, input_ids)
        with self._idle.stage("finish"):
            return parts.sum()

    def forward_separately(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The forward's addends, [T, H] each: of the routed experts, and of the shared ones or None without any.

        ValueError where the shared ones are fused with the routed.
        """
        if self.fused is not None:
            raise ValueError(
                "forward_separately with fused shared experts: one product makes their sum; load the layer without "
                "fuse_shared_experts"
            )
        if torch.compiler.is_compiling() and self.shared is None:
            return self.forward(hidden_states, router_logits, input_ids), None
        if torch.compiler.is_compiling():
            both: tuple[Tensor, Tensor] = moe_forward_separately(
                self.handle, hidden_states, router_logits, input_ids
            )
            return both
        return self.steps(hidden_states, router_logits, input_ids).separately()

    def forward_deferred(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Distributed:
        """The forward without its last collective, for a caller who fuses it with one of his own.

        The state of the result says what is missing, and :func:`~xpar.comm.reduction.to_full` supplies it.
        """
        return self.steps(hidden_states, router_logits, input_ids).deferred()

    def forward_with_routing(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The forward, and where all T tokens went: logical expert ids and weights, to be recorded and replayed."""
        parts = self.steps(hidden_states, router_logits, input_ids)
        return parts.sum(), self.tokens.whole_routing(parts.routing, hidden_states.shape[0])

    def run(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        clock: StageTimer,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Routing, Traffic]:
        """The forward, with the routing and the traffic of the tokens that this rank dispatched, and its times."""
        parts = self.steps(hidden_states, router_logits, input_ids, clock)
        with clock.stage("finish"):
            return parts.sum(), parts.routing, parts.traffic

    # -- the pipeline --------------------------------------------------------------------------------------------

    def steps(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
        clock: StageTimer | None = None,
    ) -> LayerOutput:
        """The first five steps; the parts then know the sixth, ``finish``."""
        return rest_of(self.stepwise(hidden_states, router_logits, input_ids, clock))

    def stepwise(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
        clock: StageTimer | None = None,
    ) -> Generator[None, None, LayerOutput]:
        """:meth:`steps`, which pauses once, when rows are on their way: a caller may start another step meanwhile.

        Where a kernel covers route, compute and combine, they are one call, and nothing travels.
        """
        clock = self._idle if clock is None else clock
        self._step += 1
        tokens = hidden_states.shape[0]
        mine = self.tokens.mine(tokens)
        if self.one_call is not None and self.one_call.covers(self.router, mine.stop - mine.start):
            yield
            return self._in_one_call(self.one_call, hidden_states, mine, router_logits, clock)
        with clock.stage("route"):
            routing, gate = self._route(hidden_states, mine, router_logits, input_ids)
            rows, weighted = self._rows(hidden_states[mine], routing, gate)
        shared = self.overlap.begin(self._shared_work(hidden_states, routing, gate, clock), hidden_states)
        with clock.stage("plan"):
            plan = self._plan(weighted)
        with clock.stage("dispatch"):
            moving = self.dispatcher.dispatch(rows, plan)
        shared.meanwhile(SharedOrder.DURING_DISPATCH)
        yield
        with clock.stage("dispatch"):
            arrived = moving.wait()
        with clock.stage("compute"):
            outputs = self._compute(arrived, plan)
        assert isinstance(routing, Routing)  # a failure has raised in plan
        with clock.stage("combine"):
            returning = self.dispatcher.combine(outputs, plan)
        shared.meanwhile(SharedOrder.DURING_COMBINE)
        with clock.stage("combine"):
            routed = add_identity_and_bias(returning.wait(), hidden_states[mine], routing, self.output_bias)
        clock.arrived(arrived.topk_ids)
        if self.load is not None:
            self.load.add(routing, plan.traffic)
        leave = None if self.latent is None else self.latent.leave
        return LayerOutput(
            self.tokens.claim(routed, tokens), shared.output.wait(), leave, routing, plan.traffic
        )

    def capture(self, tokens: int) -> CapturedLayer:
        """The forward as one CUDA graph for up to ``tokens`` tokens a rank; collective. ValueError where it cannot be."""
        return CapturedLayer(self, tokens)

    def count_load(self) -> LoadCounter:
        """Count from now on how the load spreads; ``runner.load = None`` ends it."""
        self.load = LoadCounter(self.dispatcher.placement, self.tokens.everyone)
        return self.load

    def experts_here(self) -> str:
        """Global ids of this rank's experts, as ``4-7`` or ``none``."""
        held = self.dispatcher.placement.experts_of(self.grid.ep_rank)
        return f"{held.start}-{held.stop - 1}" if held else "none"

    # -- what the steps are made of ---------------------------------------------------------------------------

    def _route(
        self, hidden_states: Tensor, mine: slice, router_logits: Tensor | None, input_ids: Tensor | None
    ) -> tuple[Routing | Exception, Tensor | None]:
        """The routing, and the logits [T, 1] of the shared experts' gate where the router's product makes them too.

        What went wrong here is a value: the plan tells the other ranks, and all raise together.
        """
        try:
            self._check(hidden_states)
            own = hidden_states[mine]
            logits, gate = self._logits(own, None if router_logits is None else router_logits[mine])
            return self.router.route(own, logits, None if input_ids is None else input_ids[mine]), gate
        except Exception as error:  # noqa: BLE001 - raised by plan, on every rank
            return error, None

    def _logits(self, own: Tensor, router_logits: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The logits that there are before the router is asked: those given, or those of both gates in one product."""
        if router_logits is None and isinstance(self.router, FusedGateRouter):
            return self.router.logits_of_both(own)
        return router_logits, None

    def _in_one_call(
        self,
        one_call: RouteAndCompute,
        hidden_states: Tensor,
        mine: slice,
        router_logits: Tensor | None,
        clock: StageTimer,
    ) -> LayerOutput:
        """Route, compute and combine at once."""
        own = hidden_states[mine]
        with clock.stage("route"):
            try:
                self._check(hidden_states)
                logits, gate = self._logits(own, None if router_logits is None else router_logits[mine])
                logits = one_call.router.checked_logits(own, logits)
            except Exception as error:
                self._plan(error)
                raise
        with clock.stage("compute"):
            routed, routing, traffic = one_call(own, logits)
        clock.arrived(routing.topk_ids)
        if self.load is not None:
            self.load.add(routing, traffic)
        shared = self.overlap.begin(self._shared_work(hidden_states, routing, gate, clock), hidden_states)
        claimed = self.tokens.claim(routed, hidden_states.shape[0])
        return LayerOutput(claimed, shared.output.wait(), None, routing, traffic)

    def _rows(
        self, own: Tensor, routing: Routing | Exception, gate: Tensor | None
    ) -> tuple[Tensor, Routing | Exception]:
        """What to dispatch, and with what routing: the tokens in the experts' space, weighted if the input is."""
        if isinstance(routing, Exception):
            return own, routing
        if self.fused is not None:
            return own, self.fused.append(routing, own, gate)
        return weigh_input(own if self.latent is None else self.latent.enter(own), routing)

    def _shared_work(
        self, hidden_states: Tensor, routing: Routing | Exception, gate: Tensor | None, clock: StageTimer
    ) -> SharedExpertsCall:
        """The shared experts' part of this step; nothing where there are none, or where the step fails in ``plan``."""

        def work() -> Distributed | None:
            if self.shared is None or isinstance(routing, Exception):
                return None
            with clock.stage("shared"):
                return self.shared(hidden_states, gate)

        return work

    def _plan(self, routing: Routing | Exception) -> DispatchPlan:
        tag = Tag("layer", self.layer, self._step)
        return self.dispatcher.plan(
            routing, tag=tag, hidden_size=self.config.routed_size, dtype=self.dtype, exact=self.exact
        )

    def _compute(self, arrived: ExpertInput, plan: DispatchPlan) -> Tensor:
        if self.kernel is None:
            return arrived.hidden_states.new_empty(0, self.config.routed_size)
        if self.exact:
            return self.kernel.compute_slots(arrived)
        out = self.dispatcher.output(plan, arrived.topk_ids.shape[0], arrived.hidden_states)
        return self.kernel.compute(arrived, out)

    def _check(self, hidden_states: Tensor) -> None:
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)}: expected [tokens, {self.config.hidden_size}]"
            )
        if hidden_states.dtype != self.dtype:
            raise ValueError(
                f"hidden_states are {hidden_states.dtype}, the layer computes in {self.dtype}; cast them first"
            )
