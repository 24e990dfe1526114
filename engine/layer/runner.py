"""One mixture-of-experts layer on this rank: route, plan, dispatch, compute, combine, finish."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xpar.comm.communicator import Pending, Tag
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan
from xpar.comm.grid import ProcessGrid
from xpar.comm.reduction import Distributed
from xpar.engine.config import LayerConfig
from xpar.engine.layer.expert_load import LoadCounter
from xpar.engine.layer.expert_shard import ExpertShard
from xpar.engine.layer.fused_shared_experts import SharedSlots
from xpar.engine.layer.latent import ExpertInputProjection
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import DEFAULT, LayerOptions
from xpar.engine.layer.output import LayerOutput, add_at_home, add_identity_and_bias
from xpar.engine.layer.shared_expert_overlap import Overlap, RunningSharedExperts, SharedOrder
from xpar.engine.layer.shared_experts import SharedExperts
from xpar.engine.layer.token_split import KeepAllTokens, choose_token_split
from xpar.engine.layer.torch_compile import RunnerHandle, moe_forward, moe_forward_separately
from xpar.engine.routing import RoutingRule, weigh_input
from xpar.engine.routing.router import FusedGateRouter
from xpar.kernels.contracts import ExpertInput, ExpertKernel, Routing


class RoutedTokens(NamedTuple):
    """The tokens ``[T, H]`` that this rank dispatches, after routing.

    Attributes:
        rows: What the experts read: the tokens, projected or weighted where the layer asks for it.
        routing: Where the tokens go; the exception instead, if routing failed on this rank.
        weighted: The routing that the experts get with ``rows``. It is ``routing``, with the slots of fused
            shared experts added, and with weights of 1 where ``rows`` are multiplied by the weights already.
        shared_logits: ``[T, 1]`` of the shared experts' gate, where one product made them with the router's.
    """

    hidden_states: Tensor
    rows: Tensor
    routing: Routing | Exception
    weighted: Routing | Exception
    shared_logits: Tensor | None


class StepInFlight(NamedTuple):
    """A step whose rows are on their way to the experts: what :meth:`MoERunner.complete` needs of it.

    Attributes:
        num_tokens: Tokens that were given to this rank.
        hidden_states: The tokens of them that this rank dispatches, ``[T, H]``.
        rows: The rows that arrive here, when they have arrived.
    """

    num_tokens: int
    hidden_states: Tensor
    routing: Routing
    plan: DispatchPlan
    rows: Pending[ExpertInput]
    shared: RunningSharedExperts
    observers: Observers
    residual: Tensor | None


class ComputedStep(NamedTuple):
    """A step that was computed when it was started."""

    output: LayerOutput


Step = StepInFlight | ComputedStep


class MoERunner(nn.Module):
    """One layer of a job; every rank of ``grid`` calls it together, in the same order.

    Args:
        config: The layer.
        grid: The process grid.
        router: Chooses the experts of each token. A call may bring another router, and must where this is
            None.
        experts: This rank's part of the routed experts, loaded.
        dtype: The dtype of hidden states and output.
        shared: Shared experts that compute beside the routed ones, or None.
        fused: Shared experts that are slots of the routed product, or None.
        output_bias: A bias of the layer's output, ``[H]``, or None.
        projection: What makes the experts' input of the tokens, or None where the experts read the tokens.
        options: The caller's choices.
        layer: The layer's number, for messages.
    """

    def __init__(
        self,
        config: LayerConfig,
        grid: ProcessGrid,
        router: RoutingRule | None,
        experts: ExpertShard,
        *,
        dtype: torch.dtype,
        shared: SharedExperts | None = None,
        fused: SharedSlots | None = None,
        output_bias: Tensor | None = None,
        projection: ExpertInputProjection | None = None,
        options: LayerOptions = DEFAULT,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.grid, self.layer = config, grid, layer
        self.router, self.experts = router, experts
        self.shared, self.fused = shared, fused
        self.output_bias, self.projection = output_bias, projection
        self.dtype, self.options = dtype, options
        self.tokens = choose_token_split(grid, experts.dispatcher, options.sequence_parallel)
        self.overlap = Overlap(SharedOrder.NONE if shared is None else options.shared_order, grid.device)
        self.handle = RunnerHandle(self)
        # A latent output is projected first, exact mode sums slots, and slices of tokens are gathered first.
        self._adds_at_home = (
            experts.dispatcher.capabilities.adds_at_home
            and not (options.exact or projection)
            and isinstance(self.tokens, KeepAllTokens)
        )
        self._unobserved = Observers.default(grid.device)
        self._step = 0

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher that brings tokens to the experts."""
        return self.experts.dispatcher

    @property
    def kernel(self) -> ExpertKernel | None:
        """The kernel that computes this rank's experts; None on a rank without any."""
        return self.experts.kernel

    def make_load_counter(self) -> LoadCounter:
        """Make a counter of this layer's load, for ``Observers(load=counter)`` of the calls that count."""
        return LoadCounter(self.dispatcher.placement, self.tokens.job_group)

    # -- the pipeline
    # ----------------------------------------------------------------------------------------------

    def start(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
        *,
        router: RoutingRule | None = None,
        observers: Observers | None = None,
        padding: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Step:
        """Route, plan, and send rows on their way; collective. The step must be given to :meth:`complete`.

        The arguments are those of :meth:`forward`. What is wrong with them on one rank is raised on all.
        """
        observers = self._unobserved if observers is None else observers
        self._step += 1
        with observers.stage("route"):
            routed = self._route(
                hidden_states, router_logits, input_ids, router or self.router, padding, residual
            )
        shared = self._begin_shared(hidden_states, routed, observers)
        with observers.stage("plan"):
            plan = self._plan(routed.weighted)
        assert isinstance(routed.routing, Routing)  # a failure has raised in plan
        with observers.stage("dispatch"):
            rows = self.experts.dispatch(routed.rows, plan)
        shared.run_if(SharedOrder.DURING_DISPATCH)
        return StepInFlight(
            hidden_states.shape[0],
            routed.hidden_states,
            routed.routing,
            plan,
            rows,
            shared,
            observers,
            residual,
        )

    def complete(self, step: Step, together: bool = False) -> LayerOutput:
        """Compute the rows that arrive and bring outputs home, unsummed as yet; collective.

        ``together``: nobody will ask for shared and routed output apart, so that they may be added where the
        routed output comes home.
        """
        assert isinstance(step, StepInFlight)
        observers = step.observers
        with observers.stage("dispatch"):
            arrived = step.rows.wait()
        with observers.stage("compute"):
            outputs = self.experts.compute(arrived, step.plan)
        observers.record_arrived(arrived.topk_ids)
        with observers.stage("combine"):
            returning = self.experts.combine(outputs, step.plan)
        step.shared.run_if(SharedOrder.DURING_COMBINE)
        with observers.stage("combine"):
            # Where the dispatcher adds at home, one sum takes in what is added here after the others.
            if together and self._adds_at_home and step.routing.identity_weights is None:
                routed, shared, residual = add_at_home(
                    self.dispatcher, step.plan, returning, step.shared.output, self.output_bias, step.residual
                )
            else:
                routed = add_identity_and_bias(
                    returning.wait(), step.hidden_states, step.routing, self.output_bias
                )
                shared, residual = step.shared.output.wait(), step.residual
        observers.record_step(step.routing, step.plan.pending_traffic)
        return LayerOutput(
            self.tokens.as_sharded(routed, step.num_tokens),
            shared,
            None if self.projection is None else self.projection.up,
            step.routing,
            step.plan.pending_traffic,
            observers,
            residual,
        )

    def run(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
        *,
        router: RoutingRule | None = None,
        observers: Observers | None = None,
        padding: Tensor | None = None,
        residual: Tensor | None = None,
        together: bool = False,
    ) -> LayerOutput:
        """Run :meth:`start` and :meth:`complete`: the forward but for its last sum, with routing."""
        step = self.start(
            hidden_states,
            router_logits,
            input_ids,
            router=router,
            observers=observers,
            padding=padding,
            residual=residual,
        )
        return self.complete(step, together)

    # -- ways to call it: alike up to the sum
    # ------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
        *,
        router: RoutingRule | None = None,
        observers: Observers | None = None,
        padding: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Compute the layer; collective. Under torch.compile it is one opaque operator of the graph.

        Args:
            hidden_states: This rank's tokens, ``[T, H]`` in the layer's dtype; T may differ between ranks and
                be 0.
            router_logits: ``[T, E]``, where the caller has them already.
            input_ids: ``[T]`` token ids, for layers that route by token id.
            router: Routes this call in place of the layer's own router.
            observers: Who measures this call.
            padding: ``[T]`` bool, true for rows that hold no token and go to no expert. A recorded graph
                reads it anew in each replay.
            residual: ``[T, H]`` that is added last, or None. Where the dispatcher sums at the tokens' home,
                that sum takes it in and saves a launch.

        Returns:
            ``[T, H]`` in the layer's dtype.

        Raises:
            RemoteRankError: Any rank's arguments do not fit; the same error on every rank.
            ValueError: They do not fit, and one rank holds all experts.
        """
        if torch.compiler.is_compiling():
            output: Tensor = moe_forward(self.handle, hidden_states, router_logits, input_ids, residual)
            return output
        return self.run(
            hidden_states,
            router_logits,
            input_ids,
            router=router,
            observers=observers,
            padding=padding,
            residual=residual,
            together=True,
        ).sum()

    def forward_separately(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the forward's two addends, ``[T, H]`` each: routed experts, and shared experts or None.

        Raises ValueError if the shared experts are fused with the routed ones: one product makes their sum.
        """
        if self.fused is not None:
            raise ValueError(
                "forward_separately with fused shared experts: one product makes their sum; load the layer "
                "without fuse_shared_experts"
            )
        if torch.compiler.is_compiling() and self.shared is None:
            return self.forward(hidden_states, router_logits, input_ids), None
        if torch.compiler.is_compiling():
            both: tuple[Tensor, Tensor] = moe_forward_separately(
                self.handle, hidden_states, router_logits, input_ids
            )
            return both
        return self.run(hidden_states, router_logits, input_ids).separately()

    def forward_deferred(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Distributed:
        """Run the forward without its last collective, for a caller who fuses it with one of their own.

        The state of the result says what is missing, and :func:`~xpar.comm.reduction.to_full` supplies it.
        """
        return self.run(hidden_states, router_logits, input_ids).deferred()

    def forward_with_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
        *,
        router: RoutingRule | None = None,
        observers: Observers | None = None,
    ) -> tuple[Tensor, Routing]:
        """Run the forward, and gather where all T tokens went: expert ids and weights, for a replay."""
        output = self.run(hidden_states, router_logits, input_ids, router=router, observers=observers)
        return output.sum(), self.tokens.gather_routing(output.routing, hidden_states.shape[0])

    # -- what the stages are made of
    # ---------------------------------------------------------------------------------

    def _route(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        input_ids: Tensor | None,
        router: RoutingRule | None,
        padding: Tensor | None,
        residual: Tensor | None,
    ) -> RoutedTokens:
        """Route this rank's slice of the tokens; a failure is a value, which plan raises on all ranks."""
        local = self.tokens.local_slice(hidden_states.shape[0])
        x = hidden_states[local]
        try:
            self._check(hidden_states, residual)
            if router is None:
                raise ValueError(
                    "the layer has no router of its own: give the call one, router=GivenRouting(...)"
                )
            logits, shared_logits = self._logits(x, router_logits, local, router)
            routing = router.route(x, logits, None if input_ids is None else input_ids[local])
            rows, weighted = self._expert_input(x, routing, shared_logits)
            if padding is not None:
                routing, weighted = (_without_padding(r, padding[local]) for r in (routing, weighted))
            return RoutedTokens(x, rows, routing, weighted, shared_logits)
        except Exception as error:  # noqa: BLE001 - raised by plan, on every rank
            return RoutedTokens(x, x, error, error, None)

    def _logits(
        self, x: Tensor, router_logits: Tensor | None, local: slice, router: RoutingRule
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the router logits and the shared gate's logits that exist before the router is asked."""
        if router_logits is not None:
            return router_logits[local], None
        return router.logits_of_both(x) if isinstance(router, FusedGateRouter) else (None, None)

    def _expert_input(
        self, x: Tensor, routing: Routing, shared_logits: Tensor | None
    ) -> tuple[Tensor, Routing]:
        """Return the rows to dispatch and their routing."""
        if self.fused is not None:
            return x, self.fused.append(routing, x, shared_logits)
        return weigh_input(x if self.projection is None else self.projection.down(x), routing)

    def _plan(self, routing: Routing | Exception) -> DispatchPlan:
        tag = Tag("layer", self.layer, self._step)
        return self.experts.dispatcher.plan(
            routing, tag=tag, hidden_size=self.config.routed_size, dtype=self.dtype, exact=self.options.exact
        )

    def _begin_shared(
        self, hidden_states: Tensor, routed: RoutedTokens, observers: Observers
    ) -> RunningSharedExperts:
        """Schedule the shared experts; they compute nothing where there are none, or plan will raise."""

        def compute() -> Distributed | None:
            if self.shared is None or isinstance(routed.routing, Exception):
                return None
            with observers.stage("shared"):
                return self.shared(hidden_states, routed.shared_logits)

        return self.overlap.begin(compute, hidden_states, routed.shared_logits)

    def _check(self, hidden_states: Tensor, residual: Tensor | None = None) -> None:
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)}: expected [tokens, "
                f"{self.config.hidden_size}]"
            )
        if hidden_states.dtype != self.dtype:
            raise ValueError(
                f"hidden_states are {hidden_states.dtype}, the layer computes in {self.dtype}; cast them "
                "first"
            )
        if residual is not None and residual.device != hidden_states.device:
            raise ValueError(
                f"residual is on {residual.device}, hidden_states are on {hidden_states.device}; move it "
                "there"
            )
        if residual is not None and (residual.shape, residual.dtype) != (hidden_states.shape, self.dtype):
            raise ValueError(
                f"residual of shape {tuple(residual.shape)} in {residual.dtype}: expected the shape "
                f"{tuple(hidden_states.shape)} of hidden_states and the layer's {self.dtype}"
            )


def _without_padding(routing: Routing, padding: Tensor) -> Routing:
    """Let the rows at which ``padding`` [T] is true go to no expert."""
    return replace(routing, topk_ids=routing.topk_ids.masked_fill(padding[:, None], -1))
