"""Routers: from hidden states to (topk_ids, topk_weights).

Formulas are those of the families' own modelling code: softmax or sigmoid scores, an optional correction bias that
takes part in the choice but not in the weights (DeepSeek-V3, arXiv:2412.19437, eq. 16), an optional restriction to
the best groups of experts (DeepSeek-V2, arXiv:2405.04434, section 2.2.2), renormalisation, a scaling factor.
T tokens, H hidden size, E experts, G groups, k experts per token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xpar.engine.config import RouterConfig
from xpar.kernels.contracts import Routing
from xpar.kernels.elementwise import placeless

# Rows of one product in row-invariant mode: BLAS picks its blocking, and with it the order of the sum over H, by
# shape, so that every product must have the same one. Seen with fp32: 9 rows give other bits than 8 or 12.
BLOCK_ROWS = 32

# Keeps the renormalisation of sigmoid weights finite when all k underflow; DeepSeek-V3's own value.
TINY = 1e-20


class Router:
    """Routes tokens with one layer's gate.

    ``gate``: [E, H] in the model's dtype, or None if callers always bring logits. ``correction_bias``: [E], needed
    exactly if ``config.correction_bias``. ``row_invariant``: a token's ids and weights do not depend, bit for bit,
    on which other tokens are in the batch. ``check_finite``: refuse NaN and infinite logits (this reads one number
    back from the logits' device).
    """

    def __init__(
        self,
        config: RouterConfig,
        gate: Tensor | None = None,
        correction_bias: Tensor | None = None,
        *,
        row_invariant: bool = False,
        check_finite: bool = True,
    ) -> None:
        if config.correction_bias != (correction_bias is not None):
            raise ValueError(
                f"correction_bias is {'missing' if config.correction_bias else 'given'}, but the router's "
                f"configuration says correction_bias={config.correction_bias}"
            )
        self.config = config
        self.row_invariant = row_invariant
        self.check_finite = check_finite
        self.correction_bias = None if correction_bias is None else correction_bias.float()
        # Upcast once: for 256 experts of H = 7168 the copy would cost more than the product.
        self.gate = gate.float() if gate is not None and config.logits_dtype == "float32" else gate

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[T, E] router logits of ``hidden_states`` [T, H], in float32 or the model's dtype as configured."""
        if self.gate is None:
            raise ValueError("this router has no gate weight; pass router_logits")
        if hidden_states.shape[-1] != self.gate.shape[1]:
            raise ValueError(
                f"hidden_states are {hidden_states.shape[-1]} wide, the gate takes {self.gate.shape[1]}"
            )
        return gate_logits(hidden_states.to(self.gate.dtype), self.gate, self.row_invariant)

    def route(self, hidden_states: Tensor | None, router_logits: Tensor | None = None) -> Routing:
        """Choose experts for ``hidden_states`` [T, H], or for ``router_logits`` [T, E] if those are given.

        Slots come in the order of the choice: falling score (with the correction bias), equal scores by expert id. Raises ``ValueError`` naming the
        first token whose logits are NaN or infinite.
        """
        if router_logits is None:
            if hidden_states is None:
                raise ValueError("route needs hidden_states or router_logits")
            router_logits = self.logits(hidden_states)
        elif self.gate is not None and router_logits.shape[-1] != self.gate.shape[0]:
            raise ValueError(
                f"router_logits are {router_logits.shape[-1]} wide, the layer has {self.gate.shape[0]} experts"
            )
        if self.check_finite:
            require_finite(router_logits)
        return select_experts(router_logits, self.config, self.correction_bias)


def gate_logits(hidden_states: Tensor, gate: Tensor, row_invariant: bool = False) -> Tensor:
    """``hidden_states @ gate.T``: [T, H] x [E, H] -> [T, E], all of one dtype.

    ``row_invariant``: computed in products of equal shape, so that a row's bits depend on that row alone.
    """
    if not row_invariant or hidden_states.shape[0] == 0:
        return F.linear(hidden_states, gate)
    tokens = hidden_states.shape[0]
    padded = F.pad(hidden_states, (0, 0, 0, -tokens % BLOCK_ROWS))
    blocks = padded.view(-1, BLOCK_ROWS, gate.shape[1]).unbind()
    return torch.cat([F.linear(block, gate) for block in blocks])[:tokens]


def select_experts(
    router_logits: Tensor,
    config: RouterConfig,
    correction_bias: Tensor | None = None,
    row_invariant: bool = False,
) -> Routing:
    """The choice itself: ``router_logits`` [T, E] of any float dtype, ``correction_bias`` [E] float32.

    Scores, choice and weights are float32, and each row's depend on that row alone, bit for bit.
    """
    if config.scoring == "softmax":
        scores = router_logits.softmax(dim=-1, dtype=torch.float32)
    else:
        scores = placeless(torch.sigmoid, router_logits.float())
    choice = scores if correction_bias is None else scores + correction_bias
    if config.topk_group < config.num_expert_group:
        choice = _keep_best_groups(choice, config)
    topk_ids = _largest(choice, config.top_k)
    topk_weights = scores.gather(-1, topk_ids)
    if config.renormalize:
        total = topk_weights.sum(dim=-1, keepdim=True)
        topk_weights /= total.add_(TINY) if config.scoring == "sigmoid" else total
    if config.routed_scaling_factor != 1.0:
        topk_weights *= config.routed_scaling_factor
    return Routing(topk_ids.to(torch.int32), topk_weights)


def require_finite(router_logits: Tensor) -> None:
    """Raise ``ValueError`` naming the first token of [T, E] logits with a NaN or infinite one."""
    # One sum is cheap and not finite whenever a term is not; an overflow of finite terms only costs the second look.
    if math.isfinite(float(router_logits.sum())):
        return
    bad = ~torch.isfinite(router_logits)
    if bool(bad.any()):
        token, expert = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"router logits of token {token} are not finite (expert {expert}: {float(router_logits[token, expert])}); "
            "check the hidden states and the gate weight for NaN or overflow"
        )


def _keep_best_groups(choice: Tensor, config: RouterConfig) -> Tensor:
    """``choice`` [T, E] with the experts outside the best ``topk_group`` groups at minus infinity."""
    tokens, experts = choice.shape
    groups = choice.view(tokens, config.num_expert_group, experts // config.num_expert_group)
    if config.group_score == "max":
        group_scores = groups.amax(dim=-1)
    else:
        group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    dropped = torch.ones_like(group_scores, dtype=torch.bool)
    dropped.scatter_(-1, _largest(group_scores, config.topk_group), False)
    return groups.masked_fill(dropped.unsqueeze(-1), -math.inf).view(tokens, experts)


def _largest(values: Tensor, k: int) -> Tensor:
    """[T, k] int64: positions of the k largest of ``values`` [T, N] float32, falling; equal values by position.

    ``topk`` alone leaves the order of equal values open. Its keys here are all different: the value's bits, made
    monotone as a signed integer, above the position counted from the end.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    position = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    keys = bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(position)
    return keys.topk(k, dim=-1).indices
