"""Routing drawn at random, for load tests.

It shows what a layer costs under a given balance of its experts.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from xpar.engine.routing.rule import token_rows
from xpar.kernels.contracts import Routing

LoadShape = Literal["uniform", "normal", "zipf", "all-to-one"]
LOAD_SHAPES: tuple[LoadShape, ...] = ("uniform", "normal", "zipf", "all-to-one")


class SimulatedLoadRule:
    """A rule that draws ``top_k`` different experts for each token, and random weights of sum one.

    Every call draws afresh. Rules with the same ``seed`` that are called with the same numbers of tokens draw
    the same: give ranks that hold the same tokens one seed, and other ranks other seeds.

    Args:
        load: The distribution of the experts. ``uniform``; ``normal``, that of ``floor(E sigmoid(N(0, 1)))``,
            most tokens in the middle; ``zipf``, expert e in proportion to ``1 / (e + 1)^exponent``;
            ``all-to-one``, every token to experts 0 to k - 1.
        num_experts: Experts of the layer.
        top_k: Experts of a token.
        seed: Seed of the draws.
        exponent: The exponent of ``zipf``.
    """

    def __init__(
        self, load: LoadShape, num_experts: int, top_k: int, seed: int = 0, exponent: float = 1.0
    ) -> None:
        if load not in LOAD_SHAPES:
            raise ValueError(f"load={load!r}: choose one of {', '.join(LOAD_SHAPES)}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of {num_experts} experts: choose 1 to {num_experts}")
        self.load, self.top_k = load, top_k
        self.probabilities = load_probabilities(load, num_experts, exponent)
        self._generator = torch.Generator().manual_seed(seed)

    def route(
        self,
        hidden_states: Tensor | None,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Routing:
        """Draw a routing for the number of tokens that are given, on their device."""
        given = token_rows(hidden_states, router_logits, input_ids)
        tokens = given.shape[0]
        weights = torch.rand(tokens, self.top_k, generator=self._generator) + 0.1
        routing = Routing(self._ids(tokens), weights / weights.sum(dim=-1, keepdim=True))
        return Routing(routing.topk_ids.to(given.device), routing.topk_weights.to(given.device))

    def _ids(self, tokens: int) -> Tensor:
        if self.load == "all-to-one":
            return torch.arange(self.top_k, dtype=torch.int32).repeat(tokens, 1)
        # The k largest of log p + Gumbel noise are k draws without replacement (arXiv:1903.06059).
        noise = torch.rand(tokens, len(self.probabilities), generator=self._generator, dtype=torch.float64)
        keys = self.probabilities.log() - (-noise.clamp_min(1e-300).log()).log()
        return keys.topk(self.top_k, dim=-1).indices.to(torch.int32)


def load_probabilities(load: LoadShape, num_experts: int, exponent: float = 1.0) -> Tensor:
    """Compute the probability of each expert in a token's first draw: ``[E]`` float64."""
    if load == "uniform":
        weights = torch.ones(num_experts, dtype=torch.float64)
    elif load == "zipf":
        weights = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -exponent
    elif load == "normal":
        edges = torch.special.logit(torch.linspace(0, 1, num_experts + 1, dtype=torch.float64))
        weights = (torch.erf(edges / math.sqrt(2)) / 2).diff()
    else:
        weights = (torch.arange(num_experts) == 0).double()
    return weights / weights.sum()
