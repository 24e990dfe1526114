"""What every router is, and the scores and weights that several of them share.

T tokens, H hidden size, E experts, k experts per token; all arithmetic is float32, and each row's result depends on
that row alone, bit for bit.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from xpar.engine.config import RouterConfig, Scoring
from xpar.kernels import contracts
from xpar.kernels.contracts import Routing
from xpar.kernels.position_invariant import position_invariant


class RoutingRule(Protocol):
    """Decides which experts each token goes to."""

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Route T tokens.

        ``hidden_states`` [T, H], ``router_logits`` [T, E] of any float dtype, ``input_ids`` [T] integer token ids; a
        rule says which of them it reads. Slots come in the order of the choice. Raises ``ValueError`` for what it needs
        and does not get.
        """


def required(value: Tensor | None, name: str, why: str) -> Tensor:
    """``value``, or ``ValueError`` saying which argument of ``route`` is missing and why it is needed."""
    if value is None:
        raise ValueError(f"route needs {name}: {why}")
    return value


def token_rows(
    hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None
) -> Tensor:
    """The first that is given, for rules that only count the tokens; ``ValueError`` if none is."""
    given = next((x for x in (hidden_states, router_logits, input_ids) if x is not None), None)
    if given is None:
        raise ValueError("route needs hidden_states, router_logits or input_ids, to count the tokens")
    return given


def scores_of(router_logits: Tensor, scoring: Scoring) -> Tensor:
    """[T, E] float32 scores of [T, E] logits.

    ``sqrtsoftplus``: sqrt(log(1 + exp(x))), with softplus(x) = x above 20 (DeepSeek-V4).
    """
    if scoring == "softmax":
        return router_logits.softmax(dim=-1, dtype=torch.float32)
    if scoring == "sigmoid":
        return position_invariant(torch.sigmoid, router_logits.float())
    return position_invariant(lambda x: functional.softplus(x).sqrt(), router_logits.float())


def finish_weights(
    topk_weights: Tensor, topk_ids: Tensor, config: RouterConfig, scale: Tensor | None
) -> Tensor:
    """Renormalise, then multiply by each expert's ``scale`` [E] and by the scaling factor; changes its argument."""
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
    """Raise ``ValueError`` naming the first token of [T, E] logits with a NaN or infinite one."""

    def message(bad: Tensor) -> str:
        token, expert = (int(i) for i in bad.nonzero()[0])
        return (
            f"router logits of token {token} are not finite (expert {expert}: "
            f"{float(router_logits[token, expert])}); "
            "check the hidden states and the gate weight for NaN or overflow"
        )

    contracts.require_finite(router_logits, message)
