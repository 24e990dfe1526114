"""The interface of every routing rule, and the scores and weights that several rules share.

All arithmetic is float32, and the result of a row depends on that row alone, bit for bit.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from xpar.engine.config import RouterConfig, Scoring
from xpar.kernels import contracts
from xpar.kernels.contracts import Routing
from xpar.kernels.position_invariant import position_invariant


class RoutingRule(Protocol):
    """A rule that decides which experts each token goes to."""

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Route T tokens; a rule says which of the arguments it reads.

        Args:
            hidden_states: ``[T, H]``.
            router_logits: ``[T, E]`` of any float dtype.
            input_ids: ``[T]`` integer token ids.

        Returns:
            The routing, slots in the order of the choice.

        Raises:
            ValueError: An argument that the rule reads is missing or wrong.
        """


def required(value: Tensor | None, name: str, why: str) -> Tensor:
    """Return ``value``; ValueError with the argument's ``name`` and ``why`` it is needed if it is None."""
    if value is None:
        raise ValueError(f"route needs {name}: {why}")
    return value


def token_rows(
    hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None
) -> Tensor:
    """Return the first argument that is given, for rules that only count tokens; ValueError if none is."""
    given = next((x for x in (hidden_states, router_logits, input_ids) if x is not None), None)
    if given is None:
        raise ValueError("route needs hidden_states, router_logits or input_ids, to count the tokens")
    return given


def scores_of(router_logits: Tensor, scoring: Scoring) -> Tensor:
    """Compute float32 scores ``[T, E]`` of logits ``[T, E]``.

    ``sqrtsoftplus`` is sqrt(log(1 + exp(x))), with softplus(x) = x above 20 (DeepSeek-V4).
    """
    if scoring == "softmax":
        return router_logits.softmax(dim=-1, dtype=torch.float32)
    if scoring == "sigmoid":
        return position_invariant(torch.sigmoid, router_logits.float())
    return position_invariant(lambda x: functional.softplus(x).sqrt(), router_logits.float())


def finish_weights(
    topk_weights: Tensor, topk_ids: Tensor, config: RouterConfig, scale: Tensor | None
) -> Tensor:
    """Renormalise weights [T, k] float32 in place, times ``scale`` [E] by expert and the scaling factor."""
    if config.renormalize:
        total = topk_weights.sum(dim=-1, keepdim=True)
        if config.scoring == "sigmoid":
            total += config.renormalize_min
        topk_weights /= total.clamp_min(config.renormalize_min)
    if scale is not None:
        topk_weights *= scale[topk_ids]
    if config.routed_scaling_factor != 1.0:
        topk_weights *= config.routed_scaling_factor
    return topk_weights


def require_finite(router_logits: Tensor) -> None:
    """Raise ValueError with the first token whose logits, a row of ``[T, E]``, hold a NaN or an infinity."""

    def message(bad: Tensor) -> str:
        token, expert = (int(i) for i in bad.nonzero()[0])
        return (
            f"router logits of token {token} are not finite (expert {expert}: "
            f"{float(router_logits[token, expert])}); "
            "check the hidden states and the gate weight for NaN or overflow"
        )

    contracts.require_finite(router_logits, message)


def weigh_input(hidden_states: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """Multiply tokens [T, H] by their router weight where the routing asks for it (Llama-4).

    Returns:
        For ``weight_on_input`` the scaled tokens, float32 rounded once to their dtype, and the routing with
        weights of one; otherwise both arguments as they are.
    """
    if not routing.weight_on_input:
        return hidden_states, routing
    scaled = (hidden_states.float() * routing.topk_weights).to(hidden_states.dtype)
    ones = torch.ones_like(routing.topk_weights)
    return scaled, replace(routing, topk_weights=ones, weight_on_input=False)
