"""A router that the user writes.

Any function of the tokens, checked before its answer reaches another rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from xpar.engine.routing.rule import token_rows
from xpar.kernels.contracts import Routing

RoutingFunction = Callable[[Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


class FunctionRule:
    """A rule that asks a function.

    Args:
        function: Called with (hidden_states, router_logits, input_ids); returns ``topk_ids`` [T, k], integers
            from 0 to ``num_experts`` - 1 or -1 for a slot that is not used, and ``topk_weights`` [T, k].
        num_experts: Experts of the layer.
        top_k: Experts of a token.
    """

    def __init__(self, function: RoutingFunction, num_experts: int, top_k: int) -> None:
        self.function, self.num_experts, self.top_k = function, num_experts, top_k

    def route(
        self,
        hidden_states: Tensor | None,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Routing:
        """Ask the function; raise ValueError with the first token whose routing is wrong."""
        given = token_rows(hidden_states, router_logits, input_ids)
        ids, weights = self.function(hidden_states, router_logits, input_ids)
        self._check(ids, weights, given.shape[0])
        return Routing(ids.to(torch.int32), weights.to(torch.float32))

    def _check(self, ids: Tensor, weights: Tensor, tokens: int) -> None:
        expected = [tokens, self.top_k]
        if list(ids.shape) != expected or list(weights.shape) != expected:
            raise ValueError(
                f"the routing function returned ids {list(ids.shape)} and weights {list(weights.shape)}; "
                f"both must be [tokens, top_k] = {expected}"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"the routing function returned ids as {ids.dtype}; they must be integers")
        outside = (ids < -1) | (ids >= self.num_experts)
        if bool(outside.any()):
            token, slot = (int(i) for i in outside.nonzero()[0])
            raise ValueError(
                f"the routing function sent token {token} to expert {int(ids[token, slot])}; experts are 0 "
                f"to {self.num_experts - 1}, or -1 for none"
            )
        bad = ~torch.isfinite(weights)
        if bool(bad.any()):
            token = int(bad.nonzero()[0, 0])
            raise ValueError(f"the routing function gave token {token} the weights {weights[token].tolist()}")
