"""A layer whose kernel runs route, compute and combine as one call, where one rank holds every expert.

Nothing travels there, so between those three stages there is nothing to do. :class:`FusedRunner` is a second
executor with the interface of :class:`~xpar.engine.layer.runner.MoERunner`. It is chosen once, when the layer
is built, and its result is that of the stages one by one.
"""

from functools import cached_property
from typing import cast

from torch import Tensor

from xpar.comm.dispatch.base import Dispatcher, Traffic
from xpar.comm.reduction import Distributed, Full
from xpar.engine.config import LayerConfig, RouterConfig
from xpar.engine.layer.expert_shard import ExpertShard
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import DEPTHS, Depth, LayerOptions
from xpar.engine.layer.output import LayerOutput
from xpar.engine.layer.runner import ComputedStep, MoERunner, Step
from xpar.engine.routing import RoutingRule
from xpar.engine.routing.router import Router
from xpar.kernels.contracts import FusedRoutingKernel, RouteSpec
from xpar.kernels.registry import KernelEntry


class FusedRunner(MoERunner):
    """A layer whose steps of few tokens are one call of its kernel; larger ones go stage by stage.

    The arguments are those of :class:`~xpar.engine.layer.runner.MoERunner`.
    """

    @cached_property
    def max_tokens(self) -> int | None:
        """The most tokens of a step that is one call; None for any number."""
        entry = self.experts.kernel_entry
        assert entry is not None and entry.fused_routing is not None  # why_not_fused has looked
        return entry.fused_routing.tokens if self.options.depth == "auto" else None

    @cached_property
    def route_spec(self) -> RouteSpec:
        """Describe what the kernel does in the router's place."""
        return route_spec(cast(Router, self.router).config)

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
        """Compute the step in one call; where it does not fit one call, start it as a step of several."""
        local = self.tokens.local_slice(hidden_states.shape[0])
        if padding is not None or not self._fits(local.stop - local.start, router):
            return super().start(
                hidden_states,
                router_logits,
                input_ids,
                router=router,
                observers=observers,
                padding=padding,
                residual=residual,
            )
        self._step += 1
        observers = self._unobserved if observers is None else observers
        return ComputedStep(self._compute(hidden_states, local, router_logits, observers, residual))

    def complete(self, step: Step, together: bool = False) -> LayerOutput:
        """Return the output of a step that is computed already, or complete one of several calls."""
        return step.output if isinstance(step, ComputedStep) else super().complete(step, together)

    def _fits(self, tokens: int, router: RoutingRule | None) -> bool:
        """Tell whether a step is one call: it has few tokens, and the layer's own router routes them."""
        few = self.max_tokens is None or tokens <= self.max_tokens
        return router is None and tokens > 0 and few

    def _compute(
        self,
        hidden_states: Tensor,
        local: slice,
        router_logits: Tensor | None,
        observers: Observers,
        residual: Tensor | None,
    ) -> LayerOutput:
        x, router = hidden_states[local], cast(Router, self.router)
        with observers.stage("route"):
            try:
                self._check(hidden_states, residual)
                logits, shared_logits = self._logits(x, router_logits, local, router)
                logits = router.checked_logits(x, logits)
            except Exception as error:
                self._plan(error)
                raise
        with observers.stage("compute"):
            kernel = cast(FusedRoutingKernel, self.experts.kernel)
            output, routing = kernel.route_and_compute(x, logits, self.route_spec)
        traffic = Traffic.of(0, [x.shape[0]], x.shape[0])
        observers.record_arrived(routing.topk_ids)
        observers.record_step(routing, traffic)
        shared = None
        if self.shared is not None:
            with observers.stage("shared"):
                shared = self.shared(hidden_states, shared_logits)
        routed = self.tokens.as_sharded(Distributed(output, Full()), hidden_states.shape[0])
        return LayerOutput(routed, shared, None, routing, traffic, observers, residual)


def choose_runner(config: LayerConfig, experts: ExpertShard, options: LayerOptions) -> type[MoERunner]:
    """Choose the executor of a layer; ValueError for an unknown ``depth``, or for one call that cannot be."""
    if options.depth not in DEPTHS:
        raise ValueError(f"depth={options.depth!r}: choose one of {', '.join(DEPTHS)}")
    fused = options.fuse_shared_experts
    why = why_not_fused(config, experts.kernel_entry, experts.dispatcher, exact=options.exact, fused=fused)
    if options.depth == "one-call" and why is not None:
        raise ValueError(f"depth='one-call': {why}; choose auto")
    return MoERunner if options.depth == "steps" or why is not None else FusedRunner


def route_spec(config: RouterConfig) -> RouteSpec:
    """Describe what a kernel must do to route as ``config`` says."""
    unusual = {
        config.choice: config.choice not in ("scores", "logits", "hash"),
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
        other=next((name for name, is_used in unusual.items() if is_used), None),
    )


def why_not_fused(
    config: LayerConfig, entry: KernelEntry | None, dispatcher: Dispatcher, *, exact: bool, fused: bool
) -> str | None:
    """Say why a layer takes its stages one by one; None where one call can serve.

    ``entry``: of the layer's kernel, None on a rank without experts. ``fused``: the shared experts are slots.
    """
    if dispatcher.group.size > 1:
        return f"{dispatcher.group.size} ranks hold the experts"
    if not dispatcher.capabilities.replicated_tokens:
        return f"{dispatcher.name} was asked for, which moves tokens even on one rank"
    if entry is None or entry.fused_routing is None:
        return f"{'no kernel' if entry is None else entry.name} only computes, it neither routes nor combines"
    if dispatcher.row_bytes is not None:
        return "rows are quantised before the experts"
    if exact:
        return "exact mode adds a token's outputs where the token lives"
    if fused:
        return "the router does not choose the slots of fused shared experts"
    if config.latent_size is not None or config.output_bias or config.router.norm_eps is not None:
        return "a latent space, a norm or an output bias comes between its stages"
    why = entry.fused_routing.why_not(route_spec(config.router))
    return None if why is None else f"{entry.name} {why}"


def explain_depth(
    config: LayerConfig, entry: KernelEntry, dispatcher: Dispatcher, exact: bool, depth: Depth
) -> str:
    """Explain in one line which stages of the layer are one call, or why none is."""
    why = why_not_fused(config, entry, dispatcher, exact=exact, fused=False)
    if depth == "steps":
        why = "that was asked for"
    if why is not None or entry.fused_routing is None:
        return f"one by one: {why}"
    few = "any number of" if depth == "one-call" else f"1 to {entry.fused_routing.tokens}"
    name = f"{entry.name} ({entry.fused_routing.measured})"
    return f"route, compute and combine in one call for {few} tokens: {name}"
