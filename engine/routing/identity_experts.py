"""Identity experts (LongCat-Flash): ids behind the last expert return the token, on no rank."""

from torch import Tensor

from xpar.engine.routing.rule import RoutingRule, required
from xpar.engine.routing.topk import NEEDS_LOGITS
from xpar.kernels.contracts import Routing


class IdentityExpertRule:
    """Lets ``rule`` choose among E real experts and ``zero_experts`` identity experts behind them.

    A slot of an identity expert becomes -1: it is neither sent nor counted. The sum of its weights is the
    routing's ``identity_weights``, and :func:`identity_output` computes what these slots add to the layer's
    output.
    """

    def __init__(self, rule: RoutingRule, zero_experts: int) -> None:
        self.rule, self.zero_experts = rule, zero_experts

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Route by what ``rule`` reads; ``router_logits`` are ``[T, E + Z]`` for Z identity experts."""
        logits = required(router_logits, "router_logits", NEEDS_LOGITS)
        routing = self.rule.route(hidden_states, logits, input_ids)
        zero = routing.topk_ids >= logits.shape[-1] - self.zero_experts
        return Routing(
            routing.topk_ids.masked_fill(zero, -1),
            routing.topk_weights.masked_fill(zero, 0.0),
            routing.weight_on_input,
            routing.topk_weights.masked_fill(~zero, 0.0).sum(dim=-1),
        )


def identity_output(hidden_states: Tensor, routing: Routing) -> Tensor | None:
    """Multiply each token by the sum of its identity experts' weights: ``[T, H]`` float32, or None."""
    if routing.identity_weights is None:
        return None
    return hidden_states.float() * routing.identity_weights[:, None]
