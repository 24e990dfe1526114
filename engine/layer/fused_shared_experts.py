"""Shared experts as slots of the routed product: one kernel computes all experts of a token.

Every expert-parallel rank holds a copy of the n shared experts beside its own experts. A token uses the copy
of the rank that it is on, so that it need not travel. Where ranks hold the same tokens, each rank's copy
serves a part of them. Either way a token's shared slots are those of one rank: they count once, as the slots
of any expert do.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from xpar.comm.dispatch.base import Dispatcher
from xpar.engine.architectures.layer_weights import SharedWeights
from xpar.engine.config import LayerConfig
from xpar.engine.layer.shared_experts import shared_weights
from xpar.kernels.contracts import Routing


class SharedSlots:
    """The slots of the shared experts, which are appended to every token's routing.

    Args:
        first: Id of the first shared expert in the copy of expert-parallel rank 0.
        count: Number of shared experts in each copy.
        ep: Number of copies.
        home: The expert-parallel rank whose copy serves all tokens of this rank; None where the copies take
            turns.
        gate: As for :class:`~xpar.engine.layer.shared_experts.SharedExperts`, as is ``scale``.
        row_invariant: A token's bits do not depend on the other tokens of the batch.
    """

    def __init__(
        self,
        first: int,
        count: int,
        ep: int,
        home: int | None,
        gate: Tensor | None,
        scale: float,
        row_invariant: bool = False,
    ) -> None:
        self.first, self.count, self.ep, self.home = first, count, ep, home
        self.gate, self.scale, self.row_invariant = gate, scale, row_invariant

    def append(self, routing: Routing, hidden_states: Tensor, shared_logits: Tensor | None = None) -> Routing:
        """Append the shared slots to ``routing`` of ``hidden_states`` [T, H]: ids [T, k + n].

        ``shared_logits`` [T, 1] are the shared gate's, where a product made them already.
        """
        tokens, device = hidden_states.shape[0], hidden_states.device
        if self.home is None:
            copy = torch.arange(tokens, dtype=torch.int32, device=device) % self.ep
        else:
            copy = torch.full((tokens,), self.home, dtype=torch.int32, device=device)
        shared = torch.arange(self.first, self.first + self.count, dtype=torch.int32, device=device)
        ids = shared + copy[:, None] * self.count
        weights = shared_weights(hidden_states, self.gate, self.scale, self.row_invariant, shared_logits)
        return replace(
            routing,
            topk_ids=torch.cat([routing.topk_ids, ids], dim=1),
            topk_weights=torch.cat([routing.topk_weights, weights.expand(-1, self.count)], dim=1),
        )


def count_shared_slots(config: LayerConfig) -> int:
    """Count the experts of the routed width that the shared ones are; ValueError if they cannot be."""
    shared, width = config.shared, config.intermediate_size
    if shared is None:
        raise ValueError("fuse_shared_experts: the layer has no shared experts; leave it out")
    width_of_shared = shared.intermediate_size
    multiple = f"they are {width_of_shared} wide, no multiple of the routed experts' {width}"
    wrong = {
        multiple: width_of_shared % width,
        f"the routed experts work on a latent size of {config.latent_size}": config.latent_size is not None,
        "the router's weight multiplies the tokens of routed experts": config.router.weight_on_input,
        "the routed experts have biases": config.bias,
    }
    for why, holds in wrong.items():
        if holds:
            raise ValueError(f"fuse_shared_experts: {why}, so one product cannot compute both; leave it out")
    return shared.intermediate_size // width


def check_fusable(dispatcher: Dispatcher, etp: int) -> None:
    """Raise ValueError where tokens would have to travel to the ``etp`` ranks that slice a shared expert."""
    if etp > 1 and not dispatcher.capabilities.replicated_tokens and dispatcher.group.size > 1:
        raise ValueError(
            f"fuse_shared_experts with etp={etp} and the dispatcher {dispatcher.name}: every token would "
            "travel to "
            f"the {etp} ranks that slice the shared experts; use etp=1, or leave it out"
        )


def home_rank(dispatcher: Dispatcher) -> int | None:
    """Return the ep rank whose copy serves this rank's tokens, or None where copies serve them in turn."""
    if dispatcher.capabilities.replicated_tokens and dispatcher.placement.ep > 1:
        return None
    return dispatcher.placement.ep_rank(dispatcher.group.rank)


def experts_of_shared(
    weights: SharedWeights, gated: bool, width: int, rows: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the whole shared expert into experts of the routed size, and yield (gate_up, down) of each.

    ``width``: of a routed expert, of which this rank holds ``rows``. ``gated``: as of the activation.
    """
    start, stop, _ = rows.indices(width)
    halves = weights.gate_up.chunk(2 if gated else 1)
    for first in range(0, weights.down.shape[1], width):
        part = slice(first + start, first + stop)
        yield torch.cat([half[part] for half in halves]), weights.down[:, part]
