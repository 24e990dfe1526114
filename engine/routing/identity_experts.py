"""Zero experts (LongCat-Flash): ids past the last real expert return the token as it is, and nobody computes them."""

from torch import Tensor

from xpar.engine.routing.rule import RoutingRule, required
from xpar.engine.routing.topk import NEEDS_LOGITS
from xpar.kernels.contracts import Routing


class IdentityExpertRule:
    """``rule`` chooses among E real and ``zero_experts`` identity experts, whose ids follow the real ones.

    A slot of an identity expert becomes -1: it is neither sent nor counted. What those slots are worth is the
    routing's ``identity_weights``; :func:`identity_output` is what they add to the layer.
    """

    def __init__(self, rule: RoutingRule, zero_experts: int) -> None:
        self.rule, self.zero_experts = rule, zero_experts

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Reads what ``rule`` reads; ``router_logits`` are [T, E + Z]."""
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
    """[T, H] float32: each token times the sum of its identity experts' weights; None where the layer has none."""
    if routing.identity_weights is None:
        return None
    return hidden_states.float() * routing.identity_weights[:, None]
