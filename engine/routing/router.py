"""A layer's router: its gate makes logits, its rule ids and weights; E counts identity experts."""

from torch import Tensor

from xpar.engine.config import RouterConfig
from xpar.engine.routing.choose_rule import choose_rule
from xpar.engine.routing.gate import FusedGate, gate_logits, rms_norm
from xpar.engine.routing.rule import require_finite
from xpar.kernels.contracts import Routing

__all__ = ["FusedGateRouter", "Router", "gate_logits"]


class Router:
    """Routes tokens with one layer's gate; it is a :class:`~xpar.engine.routing.rule.RoutingRule` itself.

    Args:
        config: The router. It says which of the tensors below must be given.
        gate: ``[E, H]`` in the model's dtype, or None if callers always bring logits.
        correction_bias: ``[E]``, which takes part in the choice but not in the weights.
        gate_bias: ``[E]``, added to the logits; only with ``gate``.
        expert_scale: ``[E]`` factors on the weights.
        hash_table: ``[vocabulary, k]`` expert ids by token id.
        row_invariant: A token's ids and weights do not depend, bit for bit, on the other tokens of the batch.
        check_finite: Refuse NaN and infinite logits, which reads one number back from the logits' device.
    """

    def __init__(
        self,
        config: RouterConfig,
        gate: Tensor | None = None,
        correction_bias: Tensor | None = None,
        *,
        gate_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
        hash_table: Tensor | None = None,
        row_invariant: bool = False,
        check_finite: bool = True,
    ) -> None:
        if gate is not None and config.gate_bias != (gate_bias is not None):
            raise ValueError(
                f"gate_bias is {'missing' if config.gate_bias else 'given'}, but the router's configuration "
                "says "
                f"gate_bias={config.gate_bias}"
            )
        self.config = config
        self.row_invariant = row_invariant
        self.check_finite = check_finite
        self.rule = choose_rule(config, correction_bias, expert_scale, hash_table)
        # Upcast once: for 256 experts of H = 7168 the copy would cost more than the product.
        self.gate = gate.float() if gate is not None and config.logits_dtype == "float32" else gate
        self.gate_bias = (
            gate_bias if gate_bias is None or self.gate is None else gate_bias.to(self.gate.dtype)
        )

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Compute logits ``[T, E]`` of ``hidden_states`` [T, H], in the dtype that the router asks for."""
        if self.gate is None:
            raise ValueError("this router has no gate weight; pass router_logits")
        if hidden_states.shape[-1] != self.gate.shape[1]:
            raise ValueError(
                f"hidden_states are {hidden_states.shape[-1]} wide, the gate takes {self.gate.shape[1]}"
            )
        if self.config.norm_eps is not None:
            hidden_states = rms_norm(hidden_states, self.config.norm_eps)
        return gate_logits(hidden_states.to(self.gate.dtype), self.gate, self.row_invariant, self.gate_bias)

    def route(
        self,
        hidden_states: Tensor | None,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Routing:
        """Choose experts for ``hidden_states`` [T, H], or for ``router_logits`` [T, E] if those are given.

        Slots come in the order of the choice: falling score (with the correction bias), equal scores by
        expert id. ``input_ids`` [T] are read by routing by token id alone. Raises ValueError, which names the
        first token, for logits that are NaN or infinite.
        """
        logits = self.checked_logits(hidden_states, router_logits)
        return self.rule.route(hidden_states, logits, input_ids)

    def checked_logits(self, hidden_states: Tensor | None, router_logits: Tensor | None = None) -> Tensor:
        """Return ``router_logits`` [T, E], or the gate's where they are None; raise as :meth:`route` does."""
        if router_logits is None:
            if hidden_states is None:
                raise ValueError("route needs hidden_states or router_logits")
            router_logits = self.logits(hidden_states)
        elif self.gate is not None and router_logits.shape[-1] != self.gate.shape[0]:
            raise ValueError(
                f"router_logits are {router_logits.shape[-1]} wide, the layer has {self.gate.shape[0]} "
                "experts"
            )
        if self.check_finite:
            require_finite(router_logits)
        return router_logits


class FusedGateRouter(Router):
    """A router whose product makes the logits of the shared experts' gate as well.

    ``gate`` [E, H] and ``shared_gate`` [S, H] have the dtype of the hidden states. The other arguments are
    those of :class:`Router`.
    """

    def __init__(
        self,
        config: RouterConfig,
        gate: Tensor,
        shared_gate: Tensor,
        correction_bias: Tensor | None = None,
        *,
        expert_scale: Tensor | None = None,
        hash_table: Tensor | None = None,
        row_invariant: bool = False,
        check_finite: bool = True,
    ) -> None:
        self.both = FusedGate(gate, shared_gate)
        super().__init__(
            config,
            self.both.weight[: gate.shape[0]],
            correction_bias,
            expert_scale=expert_scale,
            hash_table=hash_table,
            row_invariant=row_invariant,
            check_finite=check_finite,
        )

    def logits_of_both(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute router logits ``[T, E]`` and shared logits ``[T, S]`` of ``hidden_states`` [T, H]."""
        return self.both.logits(hidden_states, self.row_invariant)
