"""Shared experts as slots of the routed product: every token has them, and one kernel computes all its experts.

Every ep rank holds a copy of the n shared experts beside its own. A token uses the copy of the rank that it is on, to
which it need not travel; where ranks hold the same tokens, each rank's copy serves a part of them. Either way a token's
shared slots are those of one rank: they count once, as any expert's do. T tokens, H hidden size.
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
    """``first``: the id of the first shared expert of ep rank 0's copy, ``count`` each copy has; ``gate`` and ``scale``
    as for :class:`~xpar.engine.layer.shared_experts.SharedExperts`. ``home``: the ep rank whose copy serves all tokens given here, or
    None for each of the ``ep`` ranks in turn.
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
        """``routing`` of ``hidden_states`` [T, H] with the shared slots last: [T, k + n], ids as the placement has them.

        ``shared_logits``: [T, 1], where a fused product has made the gate's already.
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


def build_shared_slots(config: LayerConfig) -> int:
    """How many experts of the routed ones' width the shared experts are; ValueError where they are none such."""
    shared, width = config.shared, config.intermediate_size
    if shared is None:
        raise ValueError("fuse_shared_experts: the layer has no shared experts; leave it out")
    wrong = {
        f"they are {shared.intermediate_size} wide, no multiple of the routed experts' {width}": shared.intermediate_size
        % width,
        f"the routed experts work on a latent size of {config.latent_size}": config.latent_size is not None,
        "the router's weight multiplies the tokens that the routed experts get": config.router.weight_on_input,
        "the routed experts have biases": config.bias,
    }
    for why, holds in wrong.items():
        if holds:
            raise ValueError(f"fuse_shared_experts: {why}, so one product cannot compute both; leave it out")
    return shared.intermediate_size // width


def check_fusable(dispatcher: Dispatcher, etp: int) -> None:
    """Slices of a shared expert lie on ``etp`` ranks; ValueError where tokens would have to travel there."""
    if etp > 1 and not dispatcher.capabilities.replicated_tokens and dispatcher.group.size > 1:
        raise ValueError(
            f"fuse_shared_experts with etp={etp} and the dispatcher {dispatcher.name}: every token would travel to "
            f"the {etp} ranks that slice the shared experts; use etp=1, or leave it out"
        )


def home_rank(dispatcher: Dispatcher) -> int | None:
    """The ep rank whose copy serves this rank's tokens; None where the ranks have the same tokens and share them out."""
    if dispatcher.capabilities.replicated_tokens and dispatcher.placement.ep > 1:
        return None
    return dispatcher.placement.ep_rank(dispatcher.group.rank)


def experts_of_shared(
    weights: SharedWeights, gated: bool, width: int, rows: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """(gate_up, down) of each routed-sized expert that makes up the whole shared one; ``rows`` of its width."""
    start, stop, _ = rows.indices(width)
    halves = weights.gate_up.chunk(2 if gated else 1)
    for first in range(0, weights.down.shape[1], width):
        part = slice(first + start, first + stop)
        yield torch.cat([half[part] for half in halves]), weights.down[:, part]
