"""The router of PhiMoE.

Two rounds, each a softmax over the logits near the best of the round (arXiv:2409.12136).
"""

import math

import torch
from torch import Tensor

from xpar.engine.config import RouterConfig
from xpar.engine.routing.rule import finish_weights, required
from xpar.engine.routing.topk import NEEDS_LOGITS
from xpar.kernels.contracts import Routing
from xpar.kernels.stable_topk import stable_topk


class SparseMixerRule:
    """A rule with two experts per token, whose weights come from two softmaxes and do not add up to one.

    With s the logits and m a round's best, experts with ``(m - s) / max(|s|, m) > 2 jitter_eps`` are left out
    of that round's softmax, whose value at m is the weight. The second round leaves out the first one's
    winner.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Route by ``router_logits`` alone."""
        logits = required(router_logits, "router_logits", NEEDS_LOGITS).float()
        first, first_weight = self._round(logits, logits)
        second, second_weight = self._round(logits, logits.scatter(-1, first, -math.inf))
        topk_ids = torch.cat([first, second], dim=-1)
        topk_weights = finish_weights(
            torch.cat([first_weight, second_weight], dim=-1), topk_ids, self.config, None
        )
        return Routing(topk_ids.to(torch.int32), topk_weights)

    def _round(self, logits: Tensor, standing: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best of ``standing`` and its weight, both [T, 1].

        Distances are relative to ``logits``.
        """
        best = stable_topk(standing, 1)
        top = standing.gather(-1, best)
        distance = (top - logits) / torch.maximum(logits.abs(), top)
        near = standing.masked_fill(distance > 2 * self.config.jitter_eps, -math.inf)
        return best, near.softmax(dim=-1).gather(-1, best)
