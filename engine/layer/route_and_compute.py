"""The pipeline at its other depth: route, compute and combine as one call of a kernel that covers all three.

Nothing travels where one rank holds every expert, so between those steps there is nothing left to do. Which steps of a
layer go this way follows from the kernel's record; the result is that of the steps one by one.
"""

from typing import Literal, cast

from torch import Tensor

from xpar.comm.dispatch.base import Dispatcher, Traffic
from xpar.comm.reduction import Distributed, Full
from xpar.engine.config import LayerConfig, RouterConfig
from xpar.engine.routing import RoutingRule
from xpar.engine.routing.router import Router
from xpar.kernels.contracts import ExpertKernel, FusedRoutingKernel, RouteSpec, Routing
from xpar.kernels.registry import KernelEntry

Depth = Literal["auto", "steps", "one-call"]
DEPTHS: tuple[Depth, ...] = ("auto", "steps", "one-call")


class RouteAndCompute:
    """``kernel`` with the ``router`` whose rule it covers, for steps of 1 to ``tokens`` tokens; None for any number."""

    def __init__(self, kernel: FusedRoutingKernel, router: Router, tokens: int | None) -> None:
        self.kernel, self.router, self.tokens = kernel, router, tokens
        self.route = route_spec(router.config)

    def covers(self, router: RoutingRule, tokens: int) -> bool:
        """Whether a step of ``tokens`` tokens goes this way. One with a router that somebody put in place does not."""
        return router is self.router and tokens > 0 and (self.tokens is None or tokens <= self.tokens)

    def __call__(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[Distributed, Routing, Traffic]:
        """The combined output of ``hidden_states`` [T, H], where its tokens went, and what that moved."""
        output, routing = self.kernel.route_and_compute(hidden_states, router_logits, self.route)
        tokens = hidden_states.shape[0]
        return Distributed(output, Full()), routing, Traffic.of(0, [tokens], tokens)


def route_spec(config: RouterConfig) -> RouteSpec:
    """What a kernel must do to route as ``config`` says."""
    odd = {
        "sparsemixer": config.choice == "sparsemixer",
        "a table of token ids": config.choice == "hash",
        "identity experts": config.zero_experts > 0,
        "a factor for each expert": config.expert_scale,
        "weights on the input": config.weight_on_input,
    }
    return RouteSpec(
        top_k=config.top_k,
        scoring=config.scoring,
        among_chosen=config.choice == "logits",
        renormalize=config.renormalize,
        renormalize_min=config.renormalize_min,
        scale=config.routed_scaling_factor,
        num_expert_group=config.num_expert_group,
        correction_bias=config.correction_bias,
        other=next((what for what, there in odd.items() if there), None),
    )


def why_not_fused(
    config: LayerConfig, record: KernelEntry | None, dispatcher: Dispatcher, *, exact: bool, fused: bool
) -> str | None:
    """Why every step of such a layer is taken one by one, or None."""
    if dispatcher.group.size > 1:
        return f"{dispatcher.group.size} ranks hold the experts"
    if dispatcher.name != "replicated":
        return f"{dispatcher.name} was asked for, which moves tokens even on one rank"
    if record is None or record.fused_routing is None:
        return f"{'no kernel' if record is None else record.name} covers more than computing"
    if exact:
        return "exact mode adds a token's outputs where the token lives"
    if fused:
        return "the router does not choose the slots of fused shared experts"
    if config.latent_size is not None or config.output_bias or config.router.norm_eps is not None:
        return "a latent space, a norm or an output bias comes between its steps"
    why = record.fused_routing.why_not(route_spec(config.router))
    return None if why is None else f"{record.name} {why}"


def explain_depth(
    config: LayerConfig, record: KernelEntry, dispatcher: Dispatcher, exact: bool, depth: Depth
) -> str:
    """One line: which steps of the layer are one call, or why none is."""
    why = why_not_fused(config, record, dispatcher, exact=exact, fused=False)
    if depth == "steps":
        why = "that was asked for"
    if why is not None or record.fused_routing is None:
        return f"one by one: {why}"
    few = "any number of" if depth == "one-call" else f"1 to {record.fused_routing.tokens}"
    return f"route, compute and combine in one call for {few} tokens: {record.name} ({record.fused_routing.measured})"


def build_route_and_compute(
    kernel: ExpertKernel, router: Router, record: KernelEntry, depth: Depth
) -> RouteAndCompute:
    """For a layer of which :func:`why_not_fused` says nothing. ``depth``: ``one-call`` takes steps of any number of tokens."""
    assert record.fused_routing is not None
    tokens = record.fused_routing.tokens if depth == "auto" else None
    return RouteAndCompute(cast(FusedRoutingKernel, kernel), router, tokens)
